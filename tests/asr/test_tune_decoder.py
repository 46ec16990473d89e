"""Tuning finds weights with fewer errors, on log-probabilities that are computed once."""

import json
from pathlib import Path

import jiwer
import numpy as np
import pytest
import torch
from helpers import check_figures, save_ctc
from lhotse import CutSet
from torch import Tensor

from hubert_lightning.asr.decoder_settings import DecoderSettings, read_settings
from hubert_lightning.asr.decoding import BeamSearch
from hubert_lightning.asr.lexicon import lexicon
from hubert_lightning.asr.tune_decoder import RESCORER_WEIGHT_RANGE, WEIGHT_RANGES, tune
from hubert_lightning.cli import main
from hubert_lightning.data.manifest import read_manifest, transcript, write_manifest
from hubert_lightning.vocabulary import Vocabulary

letters = Vocabulary()


def noisy_log_probs(texts: list[str], noise: float, seed: int = 0) -> list[Tensor]:
    """Noisy log-probabilities of texts, four frames a letter."""
    rng = torch.Generator().manual_seed(seed)
    utterances = []
    for text in texts:
        path = torch.tensor([token for letter in letters.encode(text) for token in (letter, letter, 0, 0)])
        logits = noise * torch.randn(len(path), len(letters), generator=rng)
        logits[torch.arange(len(path)), path] += 4
        utterances.append(logits.log_softmax(dim=-1))
    return utterances


@pytest.mark.slow
def test_tuning_finds_weights_with_fewer_errors(digit_models: Path) -> None:
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(["ONE", "TWO", "NINE", "FOUR", "EIGHT"], size=4)) for _ in range(10)]
    log_probs = noisy_log_probs(texts, noise=3.0)
    settings = DecoderSettings(
        lm=str(digit_models / "digits.arpa"),
        lexicon=str(digit_models / "digits.lexicon"),
        lm_weight=8.0,
        word_score=-5.0,
        beam_size=30,
    )
    study, best = tune(BeamSearch(settings, letters), log_probs, texts, trials=12)
    rates = [trial.values[0] for trial in study.trials]
    assert len(rates) == 12
    assert min(rates) == study.best_value < rates[0] - 0.05
    said = [nbest[0].text for nbest in best.nbest(log_probs)]
    assert jiwer.wer(texts, said) == study.best_value
    again, _ = tune(BeamSearch(settings, letters), log_probs, texts, trials=12)
    assert [trial.params for trial in again.trials] == [trial.params for trial in study.trials]


def test_the_search_begins_with_its_own_weights_and_those_of_wav2vec_2(digit_models: Path) -> None:
    settings = DecoderSettings(
        lm=str(digit_models / "digits.arpa"), lexicon=str(digit_models / "digits.lexicon"), beam_size=5
    )
    study, _ = tune(BeamSearch(settings, letters), noisy_log_probs(["ONE"], 1.0), ["ONE"], trials=11)
    tried = [(trial.params["lm_weight"], trial.params["word_score"]) for trial in study.trials]
    # wav2vec 2.0 (arXiv 2006.11477) tables 7 and 8, 4-gram: 10 min, 1 h, 10 h, 100 h, 960 h
    librispeech = [(3.23, -0.26), (2.90, -1.62), (2.46, -0.59), (2.15, -0.52), (1.74, 0.52)]
    librivox = [(3.86, -1.18), (3.09, -2.33), (2.12, -0.90), (2.15, -0.52), (1.57, -0.64)]
    assert tried[0] == (2.0, -1.0)  # fairseq infer_kenlm.yaml
    assert set(tried[1:10]) == {*librispeech, *librivox}
    assert len(study.trials) == 11
    assert {trial.params["silence_score"] for trial in study.trials[:10]} == {0}


def test_the_ranges_of_the_search_are_those_of_the_reference() -> None:
    # fairseq examples/hubert/config/decode/ax_sweep/ngram.yaml, and the weight of transformer.yaml
    assert WEIGHT_RANGES == {"lm_weight": (0, 8), "word_score": (-5, 5), "silence_score": (-10, 0)}
    assert RESCORER_WEIGHT_RANGE == (0, 4)


def test_only_weights_that_matter_are_searched(digit_models: Path) -> None:
    search = BeamSearch(DecoderSettings(beam_size=5), letters)
    study, _ = tune(search, noisy_log_probs(["ONE"], 1.0), ["ONE"], trials=2)
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
    causal_lm: Path,
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
    check_figures(out)
    assert "% with greedy decoding" in capsys.readouterr().out
    assert json.loads(out.read_text())["num_workers"] is None


def test_manifests_without_transcripts_are_refused(
    dev: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_manifest(read_manifest(dev / "dev.jsonl.gz").drop_supervisions(), tmp_path / "mute.jsonl.gz")
    for manifest, trials, sentence in (
        (tmp_path / "mute.jsonl.gz", "3", "mute.jsonl.gz: no transcripts to compare with"),
        (dev / "dev.jsonl.gz", "0", "trials is 0; give 1 or more"),
    ):
        with pytest.raises(SystemExit):
            main(
                ["tune-decoder", str(dev / "best.ckpt"), f"[{manifest}]", str(tmp_path / "d.json"), "--trials", trials]
            )
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "d.json").exists()
