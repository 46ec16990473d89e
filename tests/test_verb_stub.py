"""Help and mistakes are answered from the sources, as the functions themselves would."""

import importlib
import inspect
import subprocess
import sys

import pytest

from hubert_lightning.cli import main
from hubert_lightning.verb_stub import stub_of, unchecked_options
from hubert_lightning.verb_table import VERBS
from hubert_lightning.verbs import signature_of

TARGETS = [
    target
    for verbs in VERBS.values()
    for entry in verbs.values()
    for target in (entry.values() if isinstance(entry, dict) else [entry])
    if not signature_of(target).parses_itself
]
UNCHECKED = {"units.kmeans_commands:fit_kmeans": {"kmeans"}}
"""Options that are classes of torch, which the function itself checks."""


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_stub_has_the_signature_and_the_text_of_its_function(target: str) -> None:
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(f"hubert_lightning.{module}"), name)
    stub = stub_of(target)
    assert stub is not None
    assert unchecked_options(stub) == UNCHECKED.get(target, set())
    assert inspect.getdoc(stub) == inspect.getdoc(function)
    expected, found = inspect.signature(function).parameters, inspect.signature(stub).parameters
    assert list(found) == list(expected)
    for argument, parameter in expected.items():
        assert str(found[argument].default) == str(parameter.default)
        if argument in UNCHECKED.get(target, set()):
            continue
        written = str(parameter.annotation).rpartition(".")[2]
        assert str(found[argument].annotation).rpartition(".")[2] == written


def test_help_and_mistakes_of_verbs_need_no_heavy_package() -> None:
    program = """
import sys
from hubert_lightning.cli import main
for typed in (
    "transcribe --help", "align --help", "units --help", "demo --help", "import --help", "quality --help",
    "kmeans fit --help", "kmeans fit mfcc a.jsonl.gz km.safetensors --layer many",
    "align MODEL a.wav --subtitles.columns many",
):
    try: main(typed.split())
    except SystemExit: pass
print([name for name in ("torch", "numpy", "lightning", "lhotse", "sklearn", "wandb") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
    assert "--layer many: not a whole number" in run.stderr
    assert "--subtitles.columns many: not a whole number" in run.stderr


def test_an_option_that_is_a_class_is_checked_by_the_function_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["kmeans", "fit", "mfcc", "absent.jsonl.gz", "km.safetensors", "--kmeans", "collections.Counter"])
    assert "kmeans" in capsys.readouterr().err
    typed = ["--kmeans", "hubert_lightning.KMeans", "--kmeans.restarts", "5", "--print_config"]
    with pytest.raises(SystemExit):
        main(["kmeans", "fit", "mfcc", "absent.jsonl.gz", "km.safetensors", *typed])
    assert "restarts: 5" in capsys.readouterr().out
