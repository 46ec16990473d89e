"""No file and no typed answer makes a library run code that came with a model."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from io import StringIO
from pathlib import Path

import pytest
import torch
from foreign_models import tiny_hubert
from helpers import ROOT, save_ctc
from safetensors.torch import load_file, save_file

from hubert_lightning.asr.causal_lm import CausalLM
from hubert_lightning.cli import main

CODE = """
from pathlib import Path
Path({trace!r}).touch()
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
class Config(GPT2Config):
    model_type = "foreign"
class Model(GPT2LMHeadModel):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {
    "AutoConfig": "foreign.Config",
    "AutoModel": "foreign.Model",
    "AutoModelForCausalLM": "foreign.Model",
    "AutoModelForCTC": "foreign.Model",
    "AutoTokenizer": ["foreign.Tokenizer", "foreign.Tokenizer"],
    "AutoFeatureExtractor": "foreign.Tokenizer",
    "AutoProcessor": "foreign.Tokenizer",
}


def with_code(folder: Path, trace: Path, **settings: object) -> Path:
    """Add a module to a model's directory, and name its classes in every settings file."""
    (folder / "foreign.py").write_text(CODE.format(trace=str(trace)))
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json"):
        file = folder / name
        content = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(content | settings | {"auto_map": AUTO_MAP, "trust_remote_code": True}))
    return folder


def foreign_lm(causal_lm: Path, folder: Path, **settings: object) -> Path:
    folder.mkdir()
    for file in causal_lm.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return with_code(folder, folder.parent / "ran", **settings)


def hubert(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command, and answer every question with y."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "hubert_lightning", *arguments]
    return subprocess.run(command, input="y\n" * 50, capture_output=True, text=True, env=environment, check=False)


def test_the_module_of_a_directory_runs_if_it_is_trusted(causal_lm: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    AutoConfig.from_pretrained(foreign_lm(causal_lm, tmp_path / "lm", model_type="foreign"), trust_remote_code=True)
    assert (tmp_path / "ran").exists()


def test_a_rescorer_s_code_is_never_offered(
    causal_lm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    with pytest.raises(ValueError, match=r"\(it needs code of its own, which is not run; give a model of an archi"):
        CausalLM(foreign_lm(causal_lm, tmp_path / "foreign", model_type="foreign"))
    # what transformers knows by itself is built of its own classes, whatever the settings name beside them
    assert CausalLM(foreign_lm(causal_lm, tmp_path / "known"))(["one two"]) == CausalLM(causal_lm)(["one two"])
    assert not asked
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("verb", ["transcribe", "align", "units", "quality", "import", "export", "tune-decoder"])
def test_no_verb_runs_the_module_of_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    tiny_hubert().save_pretrained(tmp_path / "model")
    folder = str(with_code(tmp_path / "model", tmp_path / "ran"))
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    (tmp_path / "kmeans").touch()
    rest = {
        "units": [str(tmp_path / "a.wav"), "--layer", "1", "--kmeans", str(tmp_path / "kmeans")],
        "quality": [f"[{tmp_path / 'a.jsonl'}]", str(tmp_path / "out")],
        "import": [str(tmp_path / "out.ckpt")],
        "export": [str(tmp_path / "out")],
        "tune-decoder": [f"[{tmp_path / 'a.jsonl'}]", str(tmp_path / "out.json")],
    }
    monkeypatch.setattr("sys.stdin", StringIO("y\n" * 50))
    with suppress(SystemExit):
        main([verb, folder, *rest.get(verb, [str(tmp_path / "a.wav")])])
    assert not (tmp_path / "ran").exists()
    assert "Do you wish to run" not in "".join(capsys.readouterr())


@pytest.mark.slow
def test_a_verb_refuses_a_rescorer_with_code_whatever_is_typed(causal_lm: Path, tmp_path: Path) -> None:
    save_ctc(tmp_path / "best.ckpt")
    folder = foreign_lm(causal_lm, tmp_path / "lm", model_type="foreign")
    command = ["tune-decoder", str(tmp_path / "best.ckpt"), f"[{tmp_path / 'a.jsonl'}]", str(tmp_path / "out.json")]
    ended = hubert([*command, "--rescorer", str(folder)], tmp_path)
    assert not (tmp_path / "ran").exists()
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"hubert: rescorer {folder}: no causal language model (it needs code of its own")
    assert ended.stderr.count("\n") == 1


def test_weights_in_a_pickle_are_refused(causal_lm: Path, tmp_path: Path) -> None:
    folder = foreign_lm(causal_lm, tmp_path / "lm")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="its weights are a pickle, which may hold code; open the model where"):
        CausalLM(folder)


@pytest.mark.parametrize(
    "settings", [{"n_layer": 10**9}, {"n_positions": 10**12}, {"vocab_size": 2**30}, {"n_embd": "a"}]
)
def test_settings_that_do_not_fit_the_weights_are_refused_early(
    causal_lm: Path,
    tmp_path: Path,
    settings: dict[str, object],
) -> None:
    folder = foreign_lm(causal_lm, tmp_path / "lm", **settings)
    with pytest.raises(ValueError, match="no causal language model"):
        CausalLM(folder)


def test_a_model_that_lacks_weights_is_refused(causal_lm: Path, tmp_path: Path) -> None:
    folder = foreign_lm(causal_lm, tmp_path / "lm")
    state = load_file(folder / "model.safetensors")
    del state["transformer.h.1.mlp.c_fc.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 of its weights are missing, such as transformer\.h\.1"):
        CausalLM(folder)
