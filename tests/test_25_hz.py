"""A model of 25 frames a second has what one of 50 has: labels, pre-training, fine-tuning, words, units, export."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    AT_25_HZ,
    ROOT,
    SMOKE,
    TINY,
    TWO_ITERATIONS,
    bare_trainer,
    noise_with_pauses,
    pretraining_data,
    pretraining_options,
)
from lhotse import CutSet, SupervisionSegment
from lhotse.utils import fastcopy
from lightning import Callback, Trainer
from torch import Tensor, nn

from hubert_lightning import Transcriber, Units
from hubert_lightning.asr.ctc_model import CTCModel, log_probabilities
from hubert_lightning.asr.transcript_formats import FORMATS
from hubert_lightning.cli import main
from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.examine import cut_in_memory
from hubert_lightning.errors import UserError
from hubert_lightning.features.mfcc import mfcc
from hubert_lightning.features.windows import quiet_windows
from hubert_lightning.frames import SAMPLE_RATE, Clock, frame_centres, num_frames, num_samples
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.pretrained.load import load_encoder
from hubert_lightning.training.batches import PretrainingBatches
from hubert_lightning.training.data_checks import check_transcripts
from hubert_lightning.training.pretraining import HubertPretraining
from hubert_lightning.training.relabelling import Relabel
from hubert_lightning.training.sampler import BatchPlan
from hubert_lightning.units.kmeans import assign
from hubert_lightning.units.kmeans_file import load_kmeans
from hubert_lightning.units.label_store import LabelStore
from hubert_lightning.units.label_text import export_labels, import_labels
from hubert_lightning.vocabulary import Vocabulary

CLOCK_25_HZ = Clock(640, 720)
TINY_AT_25_HZ = replace(TINY, **AT_25_HZ)


@pytest.fixture(scope="module")
def two_iterations(manifests: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pre-training of two iterations, the second on clusters of the first model."""
    output = tmp_path_factory.mktemp("25hz") / "run"
    layer = f"--config={ROOT / 'configs/pretrain/size/25hz.yaml'}"
    main(["fit", *SMOKE, layer, *pretraining_options(manifests), TWO_ITERATIONS, f"--output={output}"])
    return output


class StopAfter(Callback):
    """Ends training after a step, as a signal does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *rest: object) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def fitted(folder: Path, manifests: Path, relabel: Relabel, stop: int, resume: Path | None = None) -> HubertPretraining:
    torch.manual_seed(0)
    model = HubertPretraining(encoder=replace(TINY_AT_25_HZ, dropout=0.1), num_clusters=20, final_dim=16)
    trainer = bare_trainer(folder, max_steps=4, max_epochs=-1, callbacks=[relabel, StopAfter(stop)])
    trainer.fit(model, datamodule=pretraining_data(manifests, num_workers=0, mask_length=5), ckpt_path=resume)
    trainer.save_checkpoint(folder / "last.ckpt")
    return model


def test_the_first_labels_are_clusters_of_the_mfcc_frame_in_the_centre(
    two_iterations: Path, train_cuts: CutSet
) -> None:
    run = two_iterations / "iteration1"
    store, ([centroids], _) = LabelStore(run / "labels"), load_kmeans(run / "kmeans.safetensors")
    assert store.source.clock == CLOCK_25_HZ
    for cut in train_cuts:
        rows = mfcc(read_waveform(cut))
        # A frame of MFCCs covers 400 samples every 160: the centre of number 4k + 1 is that of the encoder's frame k
        centres = (torch.arange(len(rows)) * 160 + 200) / SAMPLE_RATE
        frames = num_frames(cut.num_samples, CLOCK_25_HZ)
        torch.testing.assert_close(centres[1::4][:frames].double(), frame_centres(frames, CLOCK_25_HZ))
        np.testing.assert_array_equal(store[cut.id][0], assign(rows[1::4][:frames], centroids).numpy())


def test_the_next_labels_are_clusters_of_the_model_s_own_frames(two_iterations: Path, dev_cuts: CutSet) -> None:
    encoder = load_encoder(two_iterations / "iteration1" / "last.ckpt")
    assert encoder.config.clock == CLOCK_25_HZ
    run = two_iterations / "iteration2"
    store, ([centroids], source) = LabelStore(run / "labels"), load_kmeans(run / "kmeans.safetensors")
    assert source["clock"] == "[640, 720]"
    assert "mean" not in source["features"]
    for cut in dev_cuts:
        with torch.no_grad():
            features = encoder.features(read_waveform(cut)[None], layer=1)[0]
        assert len(features) == num_frames(cut.num_samples, CLOCK_25_HZ)
        np.testing.assert_array_equal(store[cut.id][0], assign(features, centroids).numpy())


def test_labels_of_a_50_hz_teacher_are_clusters_of_the_mean_of_the_two_frames_inside(
    run: Path, manifests: Path, tmp_path: Path, dev_cuts: CutSet
) -> None:
    fitted(tmp_path, manifests, Relabel(str(run / "last.ckpt"), 2, 20, max_frames=2000), stop=1)
    teacher, store = load_encoder(run / "last.ckpt"), LabelStore(tmp_path / "labels")
    [centroids], source = load_kmeans(tmp_path / "kmeans.safetensors")
    assert source["features"].endswith(", mean over 720 samples every 640")
    assert (store.source.origin()["layer"], store.source.clock) == (2, CLOCK_25_HZ)
    for cut in dev_cuts:
        with torch.no_grad():
            features = teacher.features(read_waveform(cut)[None], layer=2)[0]
        frames = num_frames(cut.num_samples, CLOCK_25_HZ)
        means = (features[0 : 2 * frames : 2] + features[1 : 2 * frames : 2]) / 2
        np.testing.assert_array_equal(store[cut.id][0], assign(means, centroids).numpy())
    units = Units.from_pretrained(run / "last.ckpt", tmp_path / "kmeans.safetensors", device="cpu")
    cut = dev_cuts[0]
    np.testing.assert_array_equal(units(read_waveform(cut), SAMPLE_RATE).numpy(), store[cut.id][0])


def test_what_does_not_fit_is_refused_in_a_sentence(
    run: Path, two_iterations: Path, manifests: Path, tmp_path: Path
) -> None:
    model = HubertPretraining(encoder=TINY_AT_25_HZ, num_clusters=20, final_dim=16)
    of_50_hz = pretraining_data(manifests, labels=run / "labels", num_workers=0)
    with pytest.raises(UserError, match="labels of a frame of 25 ms every 20 ms, but the encoder has a frame of 45 ms"):
        bare_trainer(tmp_path, max_steps=1).fit(model, datamodule=of_50_hz)
    relabel = Relabel(str(two_iterations / "iteration1" / "last.ckpt"), 1, 20, max_frames=2000)
    model = HubertPretraining(encoder=TINY, num_clusters=20, final_dim=16)
    with pytest.raises(UserError, match=r"last\.ckpt has a frame of 45 ms every 40 ms, and the model that learns its"):
        bare_trainer(tmp_path, max_steps=1, callbacks=[relabel]).fit(
            model, datamodule=pretraining_data(manifests, num_workers=0)
        )


def test_a_resumed_run_ends_in_the_same_weights(manifests: Path, tmp_path: Path) -> None:
    relabel = Relabel(clusters=20, max_frames=2000)
    whole = fitted(tmp_path / "whole", manifests, relabel, stop=4)
    fitted(tmp_path / "parts", manifests, relabel, stop=2)
    resumed = fitted(tmp_path / "parts", manifests, relabel, stop=4, resume=tmp_path / "parts" / "last.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_labels_of_25_hz_survive_text(two_iterations: Path, manifests: Path, tmp_path: Path, dev_cuts: CutSet) -> None:
    store, manifest = LabelStore(two_iterations / "iteration1" / "labels"), [manifests / "dev.jsonl.gz"]
    [path] = export_labels(store.path, manifest, tmp_path / "labels.jsonl")
    again = import_labels([path], manifest, tmp_path / "labels", [20], hop=640)
    assert again.source.clock == LabelStore(tmp_path / "labels").source.clock == CLOCK_25_HZ
    for cut in dev_cuts:
        np.testing.assert_array_equal(again[cut.id], store[cut.id])
    with pytest.raises(UserError, match="at another hop"):
        import_labels([path], manifest, tmp_path / "others", [20])


def test_a_crop_has_its_labels(two_iterations: Path, train_cuts: CutSet) -> None:
    """Crops begin on the grid of 40 ms, and have the frames of their labels."""
    cuts, labels = list(train_cuts), LabelStore(two_iterations / "iteration1" / "labels")
    batches = PretrainingBatches(
        cuts, labels, max_crop_frames=30, mask_prob=0.8, mask_length=5, clock=labels.source.clock
    )
    batch = batches[BatchPlan((0, 1), 3)]
    assert batch.cluster.shape[2] == batch.mask.shape[1] == num_frames(batch.waveform.shape[1], CLOCK_25_HZ)
    for row, clusters, index in zip(batch.waveform, batch.cluster, (0, 1), strict=True):
        whole = read_waveform(cuts[index])
        grid = range(len(whole) // 640)
        first = next(frame for frame in grid if torch.equal(whole[640 * frame :][: len(row)], row))
        expected = labels[cuts[index].id][:, first : first + clusters.shape[1]]
        np.testing.assert_array_equal(clusters.numpy(), expected)


def test_a_transcript_of_more_letters_than_frames_is_refused_before_training(train_cuts: CutSet) -> None:
    frames = num_frames(train_cuts[0].num_samples, CLOCK_25_HZ)
    text = "AB" * (frames // 2 + 1)
    spoken = SupervisionSegment("spoken", train_cuts[0].recording_id, 0, train_cuts[0].duration, text=text)
    cuts = CutSet([fastcopy(train_cuts[0], supervisions=[spoken])])
    check_transcripts(cuts, Vocabulary())
    with pytest.raises(UserError, match=f"{len(text)} letters for {frames} frames .* every 40 ms"):
        check_transcripts(cuts, Vocabulary(), clock=CLOCK_25_HZ)


def heard(encoder: HubertEncoder, waveform: Tensor, word: str, start: float, end: float) -> CTCModel:
    """A model whose head is solved so that it hears the letters of a word one after another between two times."""
    vocabulary = Vocabulary()
    nn.init.normal_(encoder.projection.weight)  # so that frames differ
    with torch.no_grad():
        frames = encoder(waveform[None])[0].double()
    centres = frame_centres(len(frames), encoder.config.clock)
    inside = torch.nonzero((centres >= start) & (centres < end))[:, 0]
    best = torch.zeros(len(frames), dtype=torch.long)
    for part, letter in zip(torch.tensor_split(inside, len(word)), word, strict=True):
        best[part] = vocabulary.tokens.index(letter)
    logits = 20 * nn.functional.one_hot(best, len(vocabulary)).double()
    solved = torch.linalg.pinv(torch.cat([frames, torch.ones(len(frames), 1)], dim=1)) @ logits
    head = nn.Linear(frames.shape[1], len(vocabulary))
    head.weight.data, head.bias.data = solved[:-1].T.float(), solved[-1].float()
    return CTCModel(encoder, head, vocabulary).eval()


def test_words_have_their_times_in_every_format() -> None:
    torch.manual_seed(0)
    encoder = HubertEncoder(replace(TINY_AT_25_HZ, dim=128, num_layers=1)).eval()
    waveform = 0.1 * torch.randn(3 * SAMPLE_RATE)
    transcriber = Transcriber(heard(encoder, waveform, "HELO", 1.2, 2.0))
    transcript = transcriber(waveform, SAMPLE_RATE)
    [word] = transcript.words
    assert (transcript.text, word.text) == ("HELO", "HELO")
    assert (word.start, word.end) == pytest.approx((1.2, 2.0), abs=0.04)
    assert "00:00:01,2" in FORMATS["srt"](transcript)
    [aligned] = transcriber.align(waveform, "helo", SAMPLE_RATE).words
    assert (aligned.start, aligned.end) == pytest.approx((1.2, 2.0), abs=0.04)
    live = transcriber.live(step=0.4, lookahead=3.0, history=3.0)
    assert live.stream.clock == CLOCK_25_HZ
    [of_stream] = [*live.push(waveform), *live.finish()]
    assert (of_stream.text, of_stream.start, of_stream.end) == (word.text, word.start, word.end)


def test_a_long_recording_is_encoded_in_windows_on_the_grid_of_40_ms() -> None:
    torch.manual_seed(0)
    encoder = HubertEncoder(replace(TINY_AT_25_HZ, num_layers=1)).eval()
    model = CTCModel(encoder, nn.Linear(TINY.dim, len(Vocabulary())), Vocabulary()).eval()
    cut = cut_in_memory("long", noise_with_pauses(40))
    waveform, windows = read_waveform(cut), quiet_windows(cut, 750, CLOCK_25_HZ)
    with torch.no_grad():
        [[rows]] = log_probabilities(model, [[cut]], progress=None)
        assert len(rows) == num_frames(len(waveform), CLOCK_25_HZ) == windows[-1].end
        for first, last, start, end in windows:
            is_end = last == len(rows)
            after = len(waveform) if is_end else 640 * first + num_samples(last - first, CLOCK_25_HZ)
            expected = model(waveform[None, 640 * first : after])[0, start - first : end - first]
            torch.testing.assert_close(rows[start:end], expected)
    assert len(windows) > 1


def test_units_come_25_times_a_second_also_live(two_iterations: Path, train_cuts: CutSet) -> None:
    model, kmeans = two_iterations / "iteration1" / "last.ckpt", two_iterations / "iteration2" / "kmeans.safetensors"
    units = Units.from_pretrained(model, kmeans, device="cpu", window=10)
    waveform = torch.cat([read_waveform(cut) for cut in train_cuts])[: 25 * SAMPLE_RATE]
    whole = units(waveform, SAMPLE_RATE)
    assert len(whole) == num_frames(len(waveform), CLOCK_25_HZ) == 624
    stream = units.stream(step=0.4, lookahead=2.0, history=6.0)
    parts = [stream.push(part) for part in torch.split(waveform, 5000)]
    assert [len(part) for part in parts if len(part)] == [10] * len([part for part in parts if len(part)])
    assert len(torch.cat([*parts, stream.finish()])) == len(whole)
    with pytest.raises(UserError, match="600 samples at 16 kHz are too short: one frame takes 720"):
        units(waveform[:600], SAMPLE_RATE)


@pytest.mark.slow
def test_a_graph_of_onnx_has_the_frames_of_25_hz(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    from hubert_lightning.interchange.onnx import write_onnx

    torch.manual_seed(0)
    encoder = HubertEncoder(replace(TINY_AT_25_HZ, num_layers=1)).eval()
    assert write_onnx(tmp_path / "model.onnx", encoder, None, None, {}) < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    inputs = {"waveform": np.zeros((1, 16_000), np.float32), "length": np.array([16_000])}
    assert session.run(None, inputs)[0].shape[1] == num_frames(16_000, CLOCK_25_HZ)


def test_a_run_is_fine_tuned_with_half_of_the_frames(two_iterations: Path, manifests: Path, tmp_path: Path) -> None:
    shutil.copy(two_iterations / "iteration2" / "last.ckpt", tmp_path / "init.ckpt")
    names = {"train": "finetune", "validation": "dev"}
    main(
        [
            "fit",
            *("--config", str(ROOT / "configs/demo-finetune.yaml")),
            *("--config", str(ROOT / "tests/smoke-finetune.yaml")),
            *(f"--data.init_args.{part}=[{manifests / name}.jsonl.gz]" for part, name in names.items()),
            f"--model.init_args.pretrained={tmp_path / 'init.ckpt'}",
            "--data.init_args.mask_length=5",
            f"--output={tmp_path / 'words'}",
        ]
    )
    transcriber = Transcriber.from_pretrained(tmp_path / "words" / "last.ckpt", device="cpu")
    assert transcriber.model.clock == CLOCK_25_HZ
