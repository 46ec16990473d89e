"""Checkpoints and configs of version 0.1.0, before the modules moved into rooms, open with the same numbers.

Both files of tests/checkpoints are of that version: one step of pre-training, and a fine-tuning of the result, of the
smallest encoder. The numbers below are its outputs for `WAVEFORM`.
"""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT, parsed_config
from torch.testing import assert_close

from hubert_lightning import CTCFinetuning, HubertPretraining, load_encoder
from hubert_lightning.asr.ctc_model import load_ctc
from hubert_lightning.errors import UserError
from hubert_lightning.training.hubert_cli import HubertCLI
from hubert_lightning.training.run_folder import KEPT_CONFIG
from hubert_lightning.training.run_identity import refuse_another_run

PRETRAINING, FINETUNING = (ROOT / "tests" / "checkpoints" / f"{task}.ckpt" for task in ("pretraining", "finetuning"))
WAVEFORM = (torch.sin(torch.arange(16_000) * 0.05) * torch.linspace(0, 0.5, 16_000))[None]
LAYER2 = [[-0.5486717, -0.5373043, 0.3468151], [0.3788954, -0.9441761, 0.9002370],
          [1.9149585, 0.7720333, -0.1515763], [1.0978961, 0.8739879, 0.4026446]]  # fmt: skip
LOGITS = [[-6.9993119, -4.2848296, -6.4931607], [1.9024395, 4.2036424, 5.1914520],
          [-0.8960212, -6.7061005, -1.9808853], [-0.8497737, -6.6574740, -2.3526959]]  # fmt: skip
LOG_PROBS = [[-3.4599595, -3.9327850, -3.9651396], [-3.8740919, -3.8493881, -3.5545394],
             [-4.5508666, -2.8097031, -2.9647893], [-4.4297838, -2.7986567, -3.2576866]]  # fmt: skip


def assert_same(rows: torch.Tensor, expected: list[list[float]]) -> None:
    assert_close(rows[0, ::16, :3], torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_the_files_are_small() -> None:
    assert max(path.stat().st_size for path in (PRETRAINING, FINETUNING)) < 100_000


@torch.no_grad()
def test_an_encoder_of_an_earlier_version_has_the_same_features() -> None:
    assert_same(load_encoder(PRETRAINING).eval().features(WAVEFORM, layer=2), LAYER2)


@torch.no_grad()
def test_a_pretraining_task_of_an_earlier_version_has_the_same_logits() -> None:
    mask = torch.zeros(1, 49, dtype=torch.bool)
    mask[:, 10:20] = True
    [logits], penalty = HubertPretraining.load_from_checkpoint(PRETRAINING).eval()(WAVEFORM, mask)
    assert_same(logits, LOGITS)
    assert penalty.item() == pytest.approx(0.014742328)


@torch.no_grad()
def test_a_finetuned_model_of_an_earlier_version_has_the_same_log_probabilities() -> None:
    log_probs = load_ctc(FINETUNING)(WAVEFORM, torch.tensor([16_000]))
    assert_same(log_probs[0] if isinstance(log_probs, tuple) else log_probs, LOG_PROBS)
    CTCFinetuning.load_from_checkpoint(FINETUNING)


@pytest.mark.parametrize("checkpoint", [PRETRAINING, FINETUNING], ids=["pretraining", "finetuning"])
def test_a_config_of_an_earlier_version_parses(checkpoint: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    text = torch.load(checkpoint, weights_only=True)[KEPT_CONFIG]
    config.write_text(text)
    written, parsed = yaml.safe_load(text), parsed_config("--config", str(config), f"--output={tmp_path / 'run'}")
    for part in ("model", "data"):
        arguments = parsed.config.fit[part].init_args.as_dict()
        assert parsed.config.fit[part].class_path == written[part]["class_path"]
        assert arguments.keys() >= written[part]["init_args"].keys()
    assert parsed.config.fit.trainer.max_steps == written["trainer"]["max_steps"] == 2


@pytest.mark.parametrize(
    ("checkpoint", "change", "option"),
    [
        (PRETRAINING, "--data.init_args.mixing.probability=0.2", "data.init_args.mixing.probability"),
        (PRETRAINING, "--model.init_args.encoder.position_buckets=320", "model.init_args.encoder.position_buckets"),
        (FINETUNING, "--model.init_args.encoder.conv_bias=true", "model.init_args.encoder.conv_bias"),
    ],
)
def test_a_run_of_an_earlier_version_resumes_with_the_same_options(
    checkpoint: Path, change: str, option: str, tmp_path: Path
) -> None:
    shutil.copy(checkpoint, tmp_path / "last.ckpt")
    config = tmp_path / "config.yaml"
    config.write_text(torch.load(checkpoint, weights_only=True)[KEPT_CONFIG])
    command = ["--config", str(config), f"--output={tmp_path}"]
    same, other = HubertCLI("fit", command), HubertCLI("fit", [*command, change])
    refuse_another_run(same.config, same.parser)
    with pytest.raises(UserError, match=f"another run, which differs in {option}"):
        refuse_another_run(other.config, other.parser)
