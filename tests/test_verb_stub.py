"""Help and mistakes are answered from the sources, as the functions themselves would."""

import importlib
import inspect
import subprocess
import sys

import pytest

from hubert_lightning.cli import VERBS
from hubert_lightning.verb_stub import stub_of
from hubert_lightning.verbs import signature_of

TARGETS = [
    target
    for verbs in VERBS.values()
    for entry in verbs.values()
    for target in (entry.values() if isinstance(entry, dict) else [entry])
    if not signature_of(target).parses_itself
]
HEAVY_SIGNATURES = {"units.kmeans_commands:fit_kmeans"}
"""Functions whose options are those of classes of torch."""


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_stub_has_the_signature_and_the_text_of_its_function(target: str) -> None:
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(f"hubert_lightning.{module}"), name)
    stub = stub_of(target)
    if stub is None:
        assert target in HEAVY_SIGNATURES
        return
    assert inspect.getdoc(stub) == inspect.getdoc(function)
    expected, found = inspect.signature(function).parameters, inspect.signature(stub).parameters
    assert list(found) == list(expected)
    for argument, parameter in expected.items():
        assert str(found[argument].default) == str(parameter.default)
        written = str(parameter.annotation).rpartition(".")[2]
        assert str(found[argument].annotation).rpartition(".")[2] == written


def test_help_and_mistakes_of_verbs_need_no_heavy_package() -> None:
    program = """
import sys
from hubert_lightning.cli import main
for typed in ("transcribe --help", "align --help", "units --help", "demo --help", "import --help", "quality --help"):
    try: main(typed.split())
    except SystemExit: pass
try: main("align MODEL a.wav --subtitles.columns many".split())
except SystemExit: pass
print([name for name in ("torch", "numpy", "lightning", "lhotse", "sklearn", "wandb") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
    assert "--subtitles.columns many: not a whole number" in run.stderr
