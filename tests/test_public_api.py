import subprocess
import sys

import multiexit_engine


def test_every_public_name_exists_and_is_listed():
    names = multiexit_engine.__all__
    assert names == sorted(names)
    assert all(hasattr(multiexit_engine, name) for name in names)


def test_the_contracts_names_are_public():
    wanted = {
        "AsyncEngine",
        "Engine",
        "SamplingParams",
        "RequestOutput",
        "CompletionOutput",
        "ScoreOutput",
        "Original",
        "Exit",
        "Contrast",
        "DoLa",
        "MultiExitConfiguration",
        "VocabularyProjectionMode",
        "AutoMultiExitModel",
    }
    assert wanted <= set(multiexit_engine.__all__)


def test_importing_the_package_loads_no_model_code_of_transformers():
    code = (
        "import sys, multiexit_engine;"
        "print(any(m.startswith('transformers.models.gpt2.modeling') for m in sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
