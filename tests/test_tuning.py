"""Weights are found that make fewer errors, on log-probabilities that were computed once."""

import json
from pathlib import Path

import jiwer
import numpy as np
import pytest
import torch
from lhotse import CutSet
from test_decoding import causal_lm, files  # noqa: F401
from test_recognition import save_ctc
from torch import Tensor

from hubert_lightning.cli import main
from hubert_lightning.data.batches import transcript
from hubert_lightning.data.manifest import read_manifest, write_manifest
from hubert_lightning.data.text import Vocabulary
from hubert_lightning.decoding import BeamSearch, DecoderSettings, read_settings
from hubert_lightning.spelling import lexicon
from hubert_lightning.tuning import tune

letters = Vocabulary()


def mumbled(texts: list[str], noise: float, seed: int = 0) -> list[Tensor]:
    """Log-probabilities of somebody saying texts, four frames a letter, not clearly."""
    rng = torch.Generator().manual_seed(seed)
    heard = []
    for text in texts:
        path = torch.tensor([token for letter in letters.encode(text) for token in (letter, letter, 0, 0)])
        logits = noise * torch.randn(len(path), len(letters), generator=rng)
        logits[torch.arange(len(path)), path] += 4
        heard.append(logits.log_softmax(dim=-1))
    return heard


def test_tuning_finds_weights_with_fewer_errors(files: Path) -> None:  # noqa: F811
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(["ONE", "TWO", "NINE", "FOUR", "EIGHT"], size=4)) for _ in range(10)]
    log_probs = mumbled(texts, noise=3.0)
    settings = DecoderSettings(
        lm=str(files / "digits.arpa"),
        lexicon=str(files / "digits.lexicon"),
        lm_weight=8.0,
        word_score=-5.0,
        beam_size=30,
    )
    study, best = tune(BeamSearch(settings, letters), log_probs, texts, trials=12)
    rates = [trial.values[0] for trial in study.trials]
    assert len(rates) == 12
    assert min(rates) == study.best_value < rates[0] - 0.05
    said = [few[0].text for few in best.nbest_of(log_probs)]
    assert jiwer.wer(texts, said) == study.best_value
    again, _ = tune(BeamSearch(settings, letters), log_probs, texts, trials=12)
    assert [trial.params for trial in again.trials] == [trial.params for trial in study.trials]


def test_only_weights_that_matter_are_searched(files: Path) -> None:  # noqa: F811
    search = BeamSearch(DecoderSettings(beam_size=5), letters)
    study, _ = tune(search, mumbled(["ONE"], 1.0), ["ONE"], trials=2)
    assert study.best_params.keys() == {"silence_score"}


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory, dev_cuts: CutSet) -> Path:
    folder = tmp_path_factory.mktemp("dev")
    write_manifest(list(dev_cuts)[:4], folder / "dev.jsonl.gz")
    save_ctc(folder / "best.ckpt", spread=3.0)
    words = {word for cut in dev_cuts for word in transcript(cut, letters).split()}
    (folder / "words.txt").write_text("\n".join(sorted(words)))
    lexicon(folder / "words.txt", folder / "words.lexicon")
    return folder


def test_the_verb_writes_settings_that_test_takes_and_a_figure(
    dev: Path,
    tmp_path: Path,
    causal_lm: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "new" / "decoder.json"
    options = ["--lexicon", str(dev / "words.lexicon"), "--trials", "3", "--beam_size", "8"]
    more = ["--rescorer", str(causal_lm), "--nbest", "3"]
    main(["tune-decoder", str(dev / "best.ckpt"), f"[{dev / 'dev.jsonl.gz'}]", str(out), *options, *more])
    settings = read_settings(out)
    assert settings.beam_size == 8
    assert settings.lexicon == str(dev / "words.lexicon")
    assert settings.rescorer == str(causal_lm)
    assert settings.nbest == 3
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert "% with each frame's best letter" in capsys.readouterr().out
    assert json.loads(out.read_text())["num_workers"] is None


def test_utterances_without_words_are_no_measure(dev: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_manifest(read_manifest(dev / "dev.jsonl.gz").drop_supervisions(), tmp_path / "mute.jsonl.gz")
    for manifest, trials, sentence in (
        (tmp_path / "mute.jsonl.gz", "3", "mute.jsonl.gz: no transcripts to compare with"),
        (dev / "dev.jsonl.gz", "0", "trials is 0; try one at least"),
    ):
        with pytest.raises(SystemExit):
            main(
                ["tune-decoder", str(dev / "best.ckpt"), f"[{manifest}]", str(tmp_path / "d.json"), "--trials", trials]
            )
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "d.json").exists()
