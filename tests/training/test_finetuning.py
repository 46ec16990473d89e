import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jiwer
import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, pretraining_model, quick_adam, silent_trainer
from lhotse import CutSet
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from hubert_lightning.asr.ctc_model import load_ctc
from hubert_lightning.asr.decoder_settings import DecoderSettings
from hubert_lightning.asr.lexicon import lexicon
from hubert_lightning.data.manifest import read_manifest, write_manifest
from hubert_lightning.frames import num_frames
from hubert_lightning.pretrained.load import load_encoder, load_hubert
from hubert_lightning.training.batches import TranscribedBatches
from hubert_lightning.training.callbacks.whole_steps import WholeSteps
from hubert_lightning.training.data_checks import check_transcripts
from hubert_lightning.training.finetuning import CTCFinetuning
from hubert_lightning.training.finetuning_data import TranscribedData
from hubert_lightning.training.sampler import BatchPlan
from hubert_lightning.vocabulary import LETTERS, Vocabulary, vocabulary_of


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pretrained") / "last.ckpt"
    trainer = Trainer(accelerator="cpu", logger=False, max_steps=0, default_root_dir=path.parent)
    trainer.strategy.connect(pretraining_model())
    trainer.save_checkpoint(path, weights_only=True)
    return path


def test_the_loss_is_the_mean_of_the_utterances_ctc(train_cuts: CutSet) -> None:
    model = CTCFinetuning(encoder=TINY).eval()
    batch = TranscribedBatches(train_cuts, model.vocabulary)[BatchPlan((0, 1, 2), 0)]
    log_probs = model(batch.waveform, batch.length)
    each = [
        F.ctc_loss(
            log_probs[i, :frames],
            batch.token[i, :tokens],
            torch.tensor([frames]),
            torch.tensor([tokens]),
            reduction="sum",
        )
        for i, (frames, tokens) in enumerate(zip(num_frames(batch.length).tolist(), batch.num_tokens, strict=True))
    ]
    torch.testing.assert_close(model._loss(log_probs, batch), torch.stack(each).mean())


def test_fine_tuning_starts_from_the_pre_trained_encoder(pretrained: Path) -> None:
    model, encoder = CTCFinetuning(pretrained=pretrained).eval(), load_encoder(pretrained)
    waveform = torch.randn(1, 6000)
    torch.testing.assert_close(model.encoder(waveform), encoder(waveform))
    assert model.encoder.config.feature_grad_mult == 0
    assert not any(parameter.requires_grad for parameter in model.encoder.convolutions.parameters())


def weights(model: CTCFinetuning) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_only_the_head_learns_while_the_encoder_is_frozen(pretrained: Path, manifests: Path, tmp_path: Path) -> None:
    model = CTCFinetuning(pretrained=pretrained, freeze_steps=2, optimizer=quick_adam)
    data = TranscribedData(train=[manifests / "finetune.jsonl.gz"], max_duration=12, num_workers=0)
    before = weights(model)
    silent_trainer(tmp_path, 2).fit(model, datamodule=data)
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}


def test_after_the_freeze_the_transformer_learns_and_the_convolutions_do_not_change(
    pretrained: Path, manifests: Path, tmp_path: Path
) -> None:
    model = CTCFinetuning(pretrained=pretrained, freeze_steps=1, optimizer=quick_adam, warmup=0.0)
    data = TranscribedData(train=[manifests / "finetune.jsonl.gz"], max_duration=12, num_workers=0)
    before = weights(model)
    silent_trainer(tmp_path, 4).fit(model, datamodule=data)
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert any(name.startswith("encoder.layers.0") for name in changed)
    assert not any(name.startswith("encoder.convolutions") for name in changed)


@pytest.mark.slow
def test_a_tiny_model_overfits_eight_utterances_to_wer_0(manifests: Path, tmp_path: Path) -> None:
    cuts = sorted(read_manifest(manifests / "train.jsonl.gz"), key=lambda cut: cut.duration)[:8]
    few = tmp_path / "few.jsonl.gz"
    write_manifest(cuts, few)
    seed_everything(0, verbose=False)
    model = CTCFinetuning(
        encoder=replace(TINY, conv_channels=32, dim=96, ffn_dim=192, num_heads=4),
        activation_dropout=0.0,
        layer_drop=0.0,
        freeze_steps=0,
        freeze_convolutions=False,
        optimizer=quick_adam,
    )
    data = TranscribedData(
        train=[few], test=[few], max_duration=30, mask_prob=0.0, channel_mask_prob=0.0, num_workers=0
    )
    trainer = silent_trainer(tmp_path, 600)
    trainer.fit(model, datamodule=data)
    [metrics] = trainer.test(model, datamodule=data, verbose=False)
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").open()]
    assert [row["hypothesis"] for row in rows] == [row["reference"] for row in rows]
    assert metrics["test/wer"] == metrics["test/cer"] == 0


def test_utterances_of_both_training_and_validation_are_counted_in_a_warning(
    manifests: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = list(read_manifest(manifests / "finetune.jsonl.gz"))
    validation = [*train[:2], *read_manifest(manifests / "dev.jsonl.gz")]
    write_manifest(CutSet(validation), tmp_path / "dev.jsonl.gz")

    def warned(dev: Path) -> list[str]:
        caplog.clear()
        data = TranscribedData([manifests / "finetune.jsonl.gz"], [dev], max_duration=12, num_workers=0)
        silent_trainer(tmp_path, 1, limit_val_batches=0).fit(CTCFinetuning(encoder=TINY), datamodule=data)
        return [text for text in caplog.messages if "among the training and the validation utterances" in text]

    [warning] = warned(tmp_path / "dev.jsonl.gz")
    assert warning.startswith("2 utterances, such as ")
    assert not warned(manifests / "dev.jsonl.gz")


def test_results_name_the_language_and_the_corpus_of_each_utterance(manifests: Path, tmp_path: Path) -> None:
    cuts = list(read_manifest(manifests / "test.jsonl.gz"))[:4]
    for number, cut in enumerate(cuts):
        cut.supervisions[0].language = "en" if number else None
    write_manifest(CutSet(cuts[:2]), tmp_path / "first.jsonl.gz")
    write_manifest(CutSet(cut.with_custom("corpus", "cv") for cut in cuts[2:]), tmp_path / "second.jsonl.gz")
    data = TranscribedData(test=[tmp_path / f"{name}.jsonl.gz" for name in ("second", "first")], num_workers=0)
    silent_trainer(tmp_path, 1).test(CTCFinetuning(encoder=TINY), datamodule=data, verbose=False)
    [results] = tmp_path.rglob("test/*/test.jsonl")
    rows = {row["id"]: (row.get("language"), row["corpus"]) for row in map(json.loads, results.open())}
    assert [rows[cut.id] for cut in cuts] == [(None, "first"), ("en", "first"), ("en", "cv"), ("en", "cv")]


def test_error_rates_are_jiwers_over_all_utterances(manifests: Path, tmp_path: Path) -> None:
    seed_everything(1, verbose=False)
    model = CTCFinetuning(encoder=TINY)
    data = TranscribedData(test=[manifests / "test.jsonl.gz"], max_duration=12, num_workers=0)
    [metrics] = silent_trainer(tmp_path, 1).test(model, datamodule=data, verbose=False)
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").open()]
    references, hypotheses = [row["reference"] for row in rows], [row["hypothesis"] for row in rows]
    assert len(rows) == len(read_manifest(manifests / "test.jsonl.gz"))
    assert metrics["test/wer"] == pytest.approx(jiwer.wer(references, hypotheses))
    assert metrics["test/cer"] == pytest.approx(jiwer.cer(references, hypotheses))


def test_a_checkpoint_is_rebuilt_without_the_one_it_came_from(pretrained: Path, tmp_path: Path) -> None:
    model = CTCFinetuning(pretrained=pretrained).eval()
    trainer = silent_trainer(tmp_path, 0)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "ctc.ckpt", weights_only=True)
    kept = torch.load(tmp_path / "ctc.ckpt", weights_only=True)["hyper_parameters"]
    assert kept["pretrained"] is None
    waveform = torch.randn(1, 6000)
    torch.testing.assert_close(load_encoder(tmp_path / "ctc.ckpt")(waveform), model.encoder(waveform))


def with_text(cuts: CutSet, text: str | None) -> CutSet:
    first = next(iter(cuts))
    first = first.map_supervisions(lambda segment: _replace_text(segment, text))
    return CutSet.from_cuts([first])


def _replace_text(segment, text):  # type: ignore[no-untyped-def]
    segment.text = text
    return segment


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "no transcript in the manifest; prepare it"),
        (
            "IT COST 55 €",
            r"has characters .* vocabulary, in all '5' 2 times, '€' 1 times; .*own \(`hubert vocabulary",
        ),
        ("A" * 1000, "1000 letters for .* frames of audio, more than CTC can align"),
    ],
)
def test_transcripts_that_ctc_cannot_learn_are_named(manifests: Path, text: str | None, sentence: str) -> None:
    cuts = with_text(read_manifest(manifests / "test.jsonl.gz"), text)
    with pytest.raises(ValueError, match=f"^{next(iter(cuts)).id}: .*{sentence}"):
        check_transcripts(cuts, Vocabulary(LETTERS))


def test_repeated_letters_need_a_frame_between_them(manifests: Path) -> None:
    cuts = read_manifest(manifests / "test.jsonl.gz")
    frames = num_frames(next(iter(cuts)).num_samples)
    check_transcripts(with_text(cuts, "AB" * ((frames - 1) // 2)), Vocabulary(LETTERS))
    with pytest.raises(ValueError, match="more than CTC can align"):
        check_transcripts(with_text(cuts, "A" * (frames // 2 + 2)), Vocabulary(LETTERS))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_frozen_encoder_under_ddp_that_waits_for_it_is_refused(ranks: int, tmp_path: Path) -> None:
    model = CTCFinetuning(encoder=TINY, freeze_steps=2)
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", strategy="ddp", devices=ranks, logger=False)
    model.trainer = trainer  # type: ignore[assignment]
    with pytest.raises(ValueError, match="freeze_steps 2: the encoder has no gradients at first, which DDP waits for"):
        model.setup("fit")
    model.setup("test")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"freeze_steps": 7},
            r"of the convolutions \(frozen\), .* of the Transformer \(trained from step 7 on\), 1\.0 k of",
        ),
        (
            {"freeze_steps": 0},
            r"of the convolutions \(frozen\), .* of the Transformer \(trained from the start\), 1\.0 k",
        ),
        (
            {"freeze_steps": 3, "freeze_convolutions": False},
            r"of the convolutions \(trained from step 3 on\), .* of the Transformer \(trained from step 3 on\)",
        ),
    ],
)
def test_a_fit_logs_which_parameters_are_trained_and_from_when(options: dict[str, Any], sentence: str) -> None:
    model = CTCFinetuning(encoder=TINY, **options)
    assert re.search(sentence, model._trainable_parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    assert model._trainable_parameters().startswith(f"{total / 1e6:.2f} M parameters")


def test_unknown_characters_in_validation_are_logged_and_count_as_errors(
    manifests: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cuts = with_text(copy.deepcopy(read_manifest(manifests / "test.jsonl.gz")), "ONE É TWO")
    check_transcripts(cuts, Vocabulary(), training=False)
    assert "not in the model's vocabulary, in all 'É' 1 times; they count as errors" in caplog.text
    batch = TranscribedBatches(cuts, Vocabulary())[BatchPlan((0,), 0)]
    assert batch.text == ("ONE É TWO",)
    assert Vocabulary().decode(batch.token[0].tolist()) == "ONE TWO "


def test_a_model_uses_the_given_vocabulary(manifests: Path, tmp_path: Path) -> None:
    vocabulary, _, _ = vocabulary_of(["grün, blau 5"])
    vocabulary.write(tmp_path / "v.json")
    model = CTCFinetuning(encoder=TINY, vocabulary=tmp_path / "v.json")
    assert model.head.out_features == len(vocabulary)
    trainer = silent_trainer(tmp_path, 0)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "ctc.ckpt", weights_only=True)
    (tmp_path / "v.json").unlink()
    assert load_ctc(tmp_path / "ctc.ckpt").vocabulary == vocabulary
    again = CTCFinetuning(pretrained=tmp_path / "ctc.ckpt", keep_head=True)
    assert again.vocabulary == vocabulary
    torch.testing.assert_close(again.head.weight, model.head.weight)
    with pytest.raises(ValueError, match=r"ctc\.ckpt: its CTC head has another vocabulary than the given one"):
        CTCFinetuning(pretrained=tmp_path / "ctc.ckpt", keep_head=True, vocabulary=Vocabulary())
    with pytest.raises(ValueError, match="keep_head, but pretrained is not given"):
        CTCFinetuning(encoder=TINY, keep_head=True)


@pytest.mark.slow
def test_testing_searches_with_the_decoder_that_is_named(manifests: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("ONE TWO\n")
    lexicon(tmp_path / "words.txt", tmp_path / "words.lexicon")
    decoder = DecoderSettings(lexicon=str(tmp_path / "words.lexicon"), beam_size=10)
    model = CTCFinetuning(encoder=TINY, decoder=decoder)
    data = TranscribedData(
        validation=[manifests / "test.jsonl.gz"], test=[manifests / "test.jsonl.gz"], max_duration=12, num_workers=0
    )
    silent_trainer(tmp_path, 1).test(model, datamodule=data, verbose=False)
    words = " ".join(json.loads(line)["hypothesis"] for line in (tmp_path / "test.jsonl").open())
    assert set(words.split()) <= {"ONE", "TWO"}
    silent_trainer(tmp_path, 1).validate(model, datamodule=data, verbose=False)
    assert not set(" ".join(row["hypothesis"] for row in model.rows).split()) <= {"ONE", "TWO"}


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [2, 4, 6, 7])
def test_a_run_resumed_during_or_after_the_freeze_ends_in_the_same_weights(
    stopped: int, pretrained: Path, manifests: Path, tmp_path: Path
) -> None:
    """The encoder is frozen for four steps of two batches."""

    def fit(folder: Path, checkpoint: Path | None = None) -> dict[str, torch.Tensor]:
        seed_everything(0, verbose=False)
        model = CTCFinetuning(pretrained=pretrained, freeze_steps=4, optimizer=quick_adam, layer_drop=0.3, dropout=0.1)
        data = TranscribedData(train=[manifests / "finetune.jsonl.gz"], max_duration=6, num_workers=0)
        trainer = Trainer(
            default_root_dir=folder,
            max_steps=8,
            max_epochs=-1,
            accelerator="cpu",
            logger=False,
            accumulate_grad_batches=2,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[
                WholeSteps(),
                ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False),
            ],
        )
        trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        return model.state_dict()

    whole = fit(tmp_path / "whole")
    then = torch.load(tmp_path / "whole" / f"{stopped}.ckpt", weights_only=True)
    weight = "projection.weight"  # which no step leaves out
    learnt = not torch.equal(then["state_dict"][f"encoder.{weight}"], load_hubert(pretrained).state_dict()[weight])
    assert learnt == (stopped > 4)
    rest = fit(tmp_path / "rest", tmp_path / "whole" / f"{stopped}.ckpt")
    for name, value in whole.items():
        torch.testing.assert_close(rest[name], value, rtol=0, atol=0, msg=name)
    assert not (tmp_path / "rest" / f"{stopped - 1}.ckpt").exists()  # no step is taken again
