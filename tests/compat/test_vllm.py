"""Multi-exit GPT-2 inside vLLM's own scheduler: run in the Python that has vLLM."""

import json
import os
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from multiexit_engine import Engine, SamplingParams
from multiexit_engine.compat.vllm.request_modes import requested_mode
from tests.compat.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("MULTIEXIT_VLLM_PYTHON") or (find_spec("vllm") and sys.executable)
PAGE_MODES = ["original", "exit:6", {"mode": "contrast", "upper": 8, "lower": 4, "alpha": 0.1}]
MODES = [
    None,
    "exit:6",
    "contrast:8,4",
    {"mode": "contrast", "upper": "original", "lower": 2, "alpha": 0.2, "min_candidates": 3},
    "exit:4",
    "contrast:6,2",
    "original",
]
PROMPTS = [[464, 100, 20]] * 3 + [list(range(7, 13)), [5, 90] * 30, [300, 200], [300, 200]]
BAD = [
    {"extra_args": {"decoding": "exit:5"}},
    {"extra_args": {"decoding": "dola:low"}},
    {"extra_args": {"decoding": {"mode": "exits"}}},
    {"prompt_logprobs": 1},
]
in_vllm = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON, reason="no vLLM here, and MULTIEXIT_VLLM_PYTHON names no Python that has it"
    ),
]


def params(number, mode):
    return {"max_tokens": 8 + number} | ({"extra_args": {"decoding": mode}} if mode else {})


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    _write_entry_points(folder / "installed" / "multiexit_engine-0.dist-info")
    (folder / "page.py").write_text(Page("vllm.md").programs[0])
    good = [
        {"prompt": prompt, "params": params(number, mode)}
        for number, (prompt, mode) in enumerate(zip(PROMPTS, MODES, strict=True))
    ]
    (folder / "wanted.json").write_text(json.dumps({"good": good, "bad": BAD}))
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder / "installed")]),
    }
    program = ROOT / "tests" / "compat" / "vllm_program.py"
    names = [str(folder / name) for name in ("page.py", "wanted.json", "answers.json")]
    done = subprocess.run(
        [PYTHON, program, *names], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "answers.json").read_text())


def _write_entry_points(folder):
    """What pip writes for vLLM to find when it installs this package."""
    folder.mkdir(parents=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = []
    for group, named in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in named.items())]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n")
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: multiexit-engine\nVersion: 0\n")


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("demo", dtype="float32", device="cpu")


def ids(engine, prompt, mode, **settings):
    decoding = requested_mode({"decoding": mode})
    (output,) = engine.generate([prompt], SamplingParams(**settings), decoding)
    return list(output.outputs[0].token_ids)


class TestInsideVllm:
    pytestmark = in_vllm

    def test_the_pages_program_gives_the_engines_ids(self, answers, engine):
        wanted = [ids(engine, "The old house", mode, max_new_tokens=12) for mode in PAGE_MODES]
        assert answers["page"] == wanted

    def test_a_batch_of_different_modes_gives_the_engines_ids(self, answers, engine):
        wanted = [
            ids(engine, prompt, mode, max_new_tokens=8 + number, ignore_eos=True)
            for number, (prompt, mode) in enumerate(zip(PROMPTS, MODES, strict=True))
        ]
        assert answers["good"] == wanted

    def test_what_is_not_offered_is_refused_by_name(self, answers):
        names = ["exits at layers 2, 4, 6, 8", "original, exit and contrast", "exits", "prompt_log"]
        assert all(name in text for name, text in zip(names, answers["bad"], strict=True))

    def test_a_refused_request_harms_nobody(self, answers):
        assert answers["after"] > 0


def test_a_request_without_a_mode_takes_the_models_own_head():
    assert requested_mode(None) == requested_mode({}) == requested_mode({"decoding": "original"})


def test_a_mode_that_vllm_cannot_run_is_refused_by_name():
    with pytest.raises(ValueError, match="inside vLLM there are original, exit and contrast"):
        requested_mode({"decoding": "self_speculative:4"})
