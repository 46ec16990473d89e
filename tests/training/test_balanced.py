"""Balanced epochs: shares within rounding, the same on any number of ranks, and resumed with the very next batch."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
import torch
from helpers import (
    SMOKE_FINETUNE,
    TINY,
    finetuning_options,
    logging_trainer,
    plain_adam,
    pretraining_data,
    pretraining_model,
    refused,
    silent_trainer,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse import CutSet
from lightning import Trainer, seed_everything

from hubert_lightning.cli import main
from hubert_lightning.data.balance import Balance
from hubert_lightning.data.manifest import read_manifest, write_manifest
from hubert_lightning.errors import UserError
from hubert_lightning.training.balanced import check_same_balance
from hubert_lightning.training.finetuning import CTCFinetuning
from hubert_lightning.training.finetuning_data import TranscribedData
from hubert_lightning.training.pretraining import HubertPretraining
from hubert_lightning.training.sampler import PlannedBatches
from hubert_lightning.units.kmeans_file import load_kmeans

sizes = st.lists(st.integers(60, 300), min_size=2, max_size=4)


def mixed(sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and groups of cuts of several languages, in a random order."""
    rng = np.random.default_rng(sum(sizes))
    groups = rng.permutation(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes))
    return rng.integers(100, 780, size=len(groups)), groups


@given(sizes=sizes, shares=st.lists(st.floats(0.2, 3), min_size=4, max_size=4), block_cuts=st.sampled_from([120, 1000]))
@settings(max_examples=25, deadline=None)
def test_each_epoch_has_the_shares_of_the_groups_within_rounding(
    sizes: list[int], shares: list[float], block_cuts: int
) -> None:
    frames, groups = mixed(sizes)
    wanted = np.array(shares[: len(sizes)]) / sum(shares[: len(sizes)])
    batches = PlannedBatches(frames, 4000, groups=groups, shares=wanted, block_cuts=block_cuts)
    for epoch in range(2):
        plans = batches.plan(epoch)
        assert len(plans) == len(batches)
        seen = np.array([cut for plan in plans for cut in plan.cuts])
        drawn = np.bincount(groups[seen], frames[seen], len(sizes)) / frames[seen].sum()
        np.testing.assert_allclose(drawn, wanted, atol=0.04)
        times = np.bincount(seen, minlength=len(frames))
        for group in range(len(sizes)):  # no cut comes twice more often than another one of its language and length
            assert np.ptp(times[groups == group]) <= 2
    assert batches.plan(0) == PlannedBatches(frames, 4000, groups=groups, shares=wanted, block_cuts=block_cuts).plan(0)


@given(sizes=sizes, world_size=st.sampled_from([2, 3, 6]), block_cuts=st.sampled_from([120, 1000]))
@settings(max_examples=15, deadline=None)
def test_ranks_share_the_batches_of_a_balanced_step(sizes: list[int], world_size: int, block_cuts: int) -> None:
    frames, groups = mixed(sizes)

    def steps(world_size: int) -> list[list[tuple[int, ...]]]:
        options = {"groups": groups, "shares": np.ones(len(sizes)), "block_cuts": block_cuts}
        ranks = [
            PlannedBatches(frames, 4000, rank=rank, world_size=world_size, accumulate=6 // world_size, **options).plan(
                1
            )
            for rank in range(world_size)
        ]
        width = 6 // world_size
        starts = range(0, len(ranks[0]), width)
        return [sorted(plan.cuts for plans in ranks for plan in plans[start : start + width]) for start in starts]

    assert steps(world_size) == steps(1)


@given(sizes=sizes, done=st.integers(0, 60), block_cuts=st.sampled_from([120, 1000]))
@settings(max_examples=15, deadline=None)
def test_a_resumed_epoch_continues_with_the_very_next_batch(sizes: list[int], done: int, block_cuts: int) -> None:
    frames, groups = mixed(sizes)
    options = {"groups": groups, "shares": np.arange(1, len(sizes) + 1), "block_cuts": block_cuts, "world_size": 2}
    whole = PlannedBatches(frames, 4000, **options)
    expected = [plan for epoch in range(3) for plan in whole.plan(epoch)][done : done + 3]
    epoch, after = divmod(done, len(whole))
    resumed = PlannedBatches(frames, 4000, position=lambda: done, **options)
    following = [*resumed, *resumed.plan(epoch + 1)]
    assert following[:3] == expected
    assert len(following) == 2 * len(whole) - after


def test_a_plan_of_one_group_per_corpus_is_that_of_weights() -> None:
    frames = np.random.default_rng(0).integers(100, 780, size=500)
    groups = np.repeat(np.arange(2, dtype=np.int32), [400, 100])
    by_group = PlannedBatches(frames, 4000, groups=groups, shares=[1, 3])
    assert by_group.plan(1) == PlannedBatches(frames, 4000, corpora=[400, 100], weights=[1, 3]).plan(1)


def in_languages(manifests: Path, folder: Path, names: Sequence[str] = ("train", "dev")) -> Path:
    """The demo's manifests, with every third utterance in another language."""
    for name in names:
        cuts = list(read_manifest(manifests / f"{name}.jsonl.gz"))
        for number, cut in enumerate(cuts):
            cut.supervisions[0].language = "sw" if number % 3 == 0 else "en"
        write_manifest(CutSet(cuts), folder / f"{name}.jsonl.gz")
    return folder


def test_the_record_of_a_run_states_hours_and_shares_of_its_languages(manifests: Path, tmp_path: Path) -> None:
    data = pretraining_data(in_languages(manifests, tmp_path), balance_languages=0.0)
    data.setup("fit")
    described = data.record("train")["train"]
    assert described["balance_languages"] == 0.0
    assert {name: row["share"] for name, row in described["languages"].items()} == {"en": 0.5, "sw": 0.5}
    assert sum(row["hours"] for row in described["languages"].values()) == pytest.approx(described["hours"], abs=0.01)


def test_a_run_resumes_with_the_same_balance_alone(manifests: Path, tmp_path: Path) -> None:
    data = pretraining_data(in_languages(manifests, tmp_path), balance_languages=0.5)
    data.setup("fit")
    state = data.state_dict()
    assert state["balance"]["languages"] == 0.5
    check_same_balance(data.balance, data.train_cuts, state, "last.ckpt")
    with pytest.raises(UserError, match=r"last\.ckpt: data\.balance_languages or data\.balance_corpora is another"):
        check_same_balance(Balance(0.7), data.train_cuts, state, "last.ckpt")
    with pytest.raises(UserError, match=r"last\.ckpt: data\.balance_languages .* is another"):
        check_same_balance(Balance(), data.train_cuts, state, "last.ckpt")
    for cut in data.train_cuts:
        cut.supervisions[0].language = "en"
    with pytest.raises(UserError, match=r"the languages or corpora in the manifests of data\.train are others"):
        check_same_balance(data.balance, data.train_cuts, state, "last.ckpt")


def test_mistakes_are_refused_before_work_starts(
    manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    folder = in_languages(manifests, tmp_path)
    with pytest.raises(UserError, match=r"balance_languages names fr, a language without a recording"):
        pretraining_data(folder, balance_languages={"en": 1, "sw": 1, "fr": 1}).setup("fit")
    with pytest.raises(UserError, match=r"no language in the manifest \(and \d+ others\)"):
        pretraining_data(manifests, balance_languages=0.5).setup("fit")
    with pytest.raises(UserError, match=r"data\.weights gives each manifest its share of an epoch, and data\.balance"):
        pretraining_data(folder, balance_languages=0.5, weights=[1.0])
    with pytest.raises(UserError, match=r"(sw|en): no utterance lasts min_duration"):
        pretraining_data(folder, balance_languages=0.5, min_duration=100.0).setup("fit")
    pretraining_data(manifests, balance_corpora=0.5).setup("fit")
    assert "data.balance_corpora changes nothing: all utterances are of one corpus, train" in caplog.text
    command = ("kmeans", "fit", "mfcc", str(folder / "train.jsonl.gz"), str(tmp_path / "km.safetensors"))
    assert "balance_languages is 2.0; it is an exponent" in refused(capsys, *command, "--balance_languages=2")


def test_k_means_is_fitted_on_a_balanced_sample_and_says_so(manifests: Path, tmp_path: Path) -> None:
    folder = in_languages(manifests, tmp_path)
    sources = []
    for name, options in (("plain", []), ("balanced", ["--balance_languages={en: 1, sw: 3}"])):
        out = tmp_path / f"{name}.safetensors"
        command = ["kmeans", "fit", "mfcc", str(folder / "train.jsonl.gz"), str(out), "--clusters=8"]
        main([*command, "--max_frames=1000", "--num_workers=0", *options])
        sources.append(load_kmeans(out)[1])
    assert "balance" not in sources[0]
    assert '"languages": {"en": 1' in sources[1]["balance"]
    assert Counter(map(len, sources)) == Counter({len(sources[0]): 1, len(sources[0]) + 1: 1})


@pytest.mark.slow
def test_a_balanced_run_that_resumes_ends_in_the_weights_of_an_uninterrupted_one(
    manifests: Path, tmp_path: Path
) -> None:
    folder = in_languages(manifests, tmp_path)

    def trained(steps: int, balance: float = 0.0, **options: Any) -> tuple[HubertPretraining, Trainer]:
        seed_everything(0, verbose=False)
        model = pretraining_model()
        model.configure_optimizers = lambda: plain_adam(model.parameters())  # type: ignore[method-assign]
        trainer = logging_trainer(tmp_path / "run", steps)
        data = pretraining_data(folder, num_workers=0, max_duration=6, balance_languages=balance)
        trainer.fit(model, datamodule=data, **options)
        return model, trainer

    whole, _ = trained(5)
    trained(2)[1].save_checkpoint(tmp_path / "two.ckpt")
    resumed, _ = trained(5, ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    for name, here in resumed.state_dict().items():
        torch.testing.assert_close(here, whole.state_dict()[name], rtol=0, atol=0, msg=name)
    with pytest.raises(UserError, match=r"data\.balance_languages or data\.balance_corpora is another"):
        trained(5, 0.5, ckpt_path=tmp_path / "two.ckpt", weights_only=True)


@pytest.mark.slow
def test_a_fine_tuning_is_balanced_and_tested_by_language(manifests: Path, tmp_path: Path) -> None:
    folder = in_languages(manifests, tmp_path, ("finetune", "dev", "test"))
    root = Path(__file__).parent.parent.parent
    layers = [f"--config={root / name}" for name in ("configs/finetune/small.yaml", "tests/smoke-finetune.yaml")]
    output = f"--output={tmp_path / 'run'}"
    main(["fit", *layers, *finetuning_options(folder), "--data.balance_languages={en: 1, sw: 2}", output])
    record = json.loads((tmp_path / "run/record.json").read_text())
    assert record["data/train/languages/sw/share"] == pytest.approx(2 / 3, abs=1e-3)
    main(["test", "--config", str(tmp_path / "run/config.yaml"), output])
    scores = json.loads((tmp_path / "run/scores.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "run/test.jsonl").read_text().splitlines()]
    for name, part in scores["languages"].items():
        texts = zip(*((row["reference"], row["hypothesis"]) for row in rows if row["language"] == name), strict=True)
        assert part["words"]["rate"] == pytest.approx(jiwer.wer(*map(list, texts)))
    tables = [path.read_text() for path in (tmp_path / "run").rglob("metrics.csv")]
    assert any("test/wer/languages/sw" in table and "test/cer/mean_of_languages" in table for table in tables)
    assert any("val/wer/languages/sw" in table and "val/cer/mean_of_languages" in table for table in tables)


def test_validation_by_language_is_jiwers_on_one_rank_and_on_two(
    manifests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = in_languages(manifests, tmp_path, ("dev",))
    data = TranscribedData(validation=[folder / "dev.jsonl.gz"], max_duration=12, num_workers=0)
    torch.manual_seed(1)
    model = CTCFinetuning(encoder=TINY)
    trainer = silent_trainer(tmp_path, 1)
    [metrics] = trainer.validate(model, datamodule=data, verbose=False)
    names = {cut.id: cut.supervisions[0].language for cut in read_manifest([folder / "dev.jsonl.gz"])}
    for language in ("en", "sw"):
        rows = [row for row in model.rows if names[row["id"]] == language]
        texts = [row["reference"] for row in rows], [row["hypothesis"] for row in rows]
        assert metrics[f"val/wer/languages/{language}"] == pytest.approx(jiwer.wer(*texts))
        assert metrics[f"val/cer/languages/{language}"] == pytest.approx(jiwer.cer(*texts))

    def of_two_ranks(gathered: list[list[dict[str, str]]], rows: list[dict[str, str]]) -> None:
        gathered[:] = [rows[:3], [*rows[3:], rows[0]]]  # the second rank repeats an utterance

    monkeypatch.setattr(torch.distributed, "all_gather_object", of_two_ranks)
    monkeypatch.setattr(type(trainer), "world_size", 2)
    assert model._rows_of_all_ranks() == model.rows


@pytest.mark.parametrize("monitor", ["val/wer/languages/de", "val/cer/mean_of_corpora"])
def test_a_callback_cannot_monitor_a_language_or_corpus_that_validation_lacks(
    monitor: str, manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = in_languages(manifests, tmp_path, ("finetune", "dev", "test"))
    callbacks = f"[{{class_path: hubert_lightning.BestCheckpoints, init_args: {{monitor: {monitor}}}}}]"
    arguments = [*SMOKE_FINETUNE, *finetuning_options(folder), f"--trainer.callbacks={callbacks}"]
    sentence = refused(capsys, "fit", *arguments, f"--output={tmp_path / 'run'}")
    assert f"BestCheckpoints monitors {monitor}, which the utterances of data.validation do not give" in sentence
    assert "val/wer/languages/en, val/cer/languages/en, val/wer/languages/sw" in sentence
    assert not [*tmp_path.glob("run/**/*.ckpt")]
