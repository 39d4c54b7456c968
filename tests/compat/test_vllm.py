"""Multi-exit models inside vLLM's own scheduler: run in the Python that has vLLM."""

import json
import os
import socket
import subprocess
import sys
import time
import tomllib
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from multiexit_engine import Contrast, Engine, Exit, SamplingParams
from multiexit_engine.compat.vllm.request_modes import requested_mode
from tests.compat.pages import Page
from tests.compat.vllm_checkpoints import save_gpt_neo, save_llama

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
TINY_MODES = [mode.replace("8", "6") if isinstance(mode, str) else mode for mode in MODES]
EAGER, COMPILED = {"enforce_eager": True}, {}
SETUPS = {
    "gpt_neo": (save_gpt_neo, EAGER),
    "gpt_neo compiled": (save_gpt_neo, COMPILED),
    "gpt_neo in a pipeline of two": (save_gpt_neo, {"pipeline_parallel_size": 2}),
    "llama compiled": (save_llama, COMPILED),
    "llama on two processes": (save_llama, {"tensor_parallel_size": 2} | EAGER),
    "llama in a pipeline of two": (save_llama, {"pipeline_parallel_size": 2}),
}
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
    (folder / "page.py").write_text(Page("vllm.md").programs[0])
    wanted = {"good": requests(MODES), "bad": BAD}
    return run_in_vllm(folder, "vllm_program.py", wanted, str(folder / "page.py"))


def requests(modes):
    return [
        {"prompt": prompt, "params": params(number, mode)}
        for number, (prompt, mode) in enumerate(zip(PROMPTS, modes, strict=True))
    ]


def run_in_vllm(folder, program, wanted, *arguments, **variables):
    """What a program of this folder answers in a Python that has vLLM and this package."""
    (folder / "wanted.json").write_text(json.dumps(wanted))
    environment = with_vllm(folder) | variables
    command = [PYTHON, ROOT / "tests" / "compat" / program, *arguments]
    command += [str(folder / name) for name in ("wanted.json", "answers.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "answers.json").read_text())


def with_vllm(folder):
    """The environment of a process that finds vLLM, and this package as if it were installed."""
    _write_entry_points(folder / "installed" / "multiexit_engine-0.dist-info")
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder / "installed")]),
    }


@contextmanager
def vllm_serve(folder):
    """The address of vLLM's own server with the demo model."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    # the command `vllm` asks for the version of a package that vllm-cpu is not
    module = "vllm.entrypoints.openai.api_server"
    start = f"import runpy; runpy.run_module({module!r}, run_name='__main__')"
    model = str(ROOT / "multiexit_engine" / "assets" / "demo")
    options = ["--model", model, "--dtype", "float32", "--enforce-eager", "--port", str(port)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [PYTHON, "-c", start, *options], env=with_vllm(folder), stdout=log, stderr=log
        )
    try:
        end = time.monotonic() + 400
        while not _is_ready(port):
            assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()
            time.sleep(1)
        yield f"http://127.0.0.1:{port}", model
    finally:
        process.terminate()
        process.wait(60)


def _is_ready(port):
    with suppress(httpx.HTTPError):
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    return False


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

    @pytest.mark.parametrize("setup", SETUPS)
    def test_every_family_and_setup_gives_the_engines_ids(self, setup, tmp_path):
        save, options = SETUPS[setup]
        model = save(tmp_path / "model")
        wanted = {"model": str(model), "tokenizer": str(model), "options": options}
        # vLLM gives each process a NUMA node of its own where it is not told which cores to take
        cores = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if "two" in setup else {}
        wanted["good"] = requests(TINY_MODES)
        found = run_in_vllm(tmp_path, "vllm_batch.py", wanted, **cores)
        alone = Engine.from_pretrained(model, dtype="float32", device="cpu")
        assert found == [
            ids(alone, prompt, mode, max_new_tokens=8 + number, ignore_eos=True)
            for number, (prompt, mode) in enumerate(zip(PROMPTS, TINY_MODES, strict=True))
        ]

    def test_vllms_own_server_takes_a_mode_with_a_request(self, tmp_path, engine):
        body = {"prompt": "The old house", "temperature": 0, "max_tokens": 12}
        with vllm_serve(tmp_path) as (url, model):
            answers = [
                httpx.post(
                    url + "/v1/completions",
                    json=body | {"model": model, "vllm_xargs": {"decoding": mode}},
                    timeout=120,
                )
                for mode in ("contrast:8,4", "exit:6", "exit:5")
            ]
        params = SamplingParams(max_new_tokens=12)
        wanted = [engine.generate("The old house", params, m) for m in (Contrast(8, 4), Exit(6))]
        texts = [answer.json()["choices"][0]["text"] for answer in answers[:2]]
        assert texts == [output.outputs[0].text for (output,) in wanted]
        assert answers[2].status_code == 400 and "exits at layers 2, 4, 6, 8" in answers[2].text

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
