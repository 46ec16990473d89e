"""Units of any audio: a notebook call, files of any format, long recordings, and what is heard chunk by chunk."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from helpers import TINY, read_samples, run_verb
from hypothesis import given
from hypothesis import strategies as st
from lhotse import CutSet
from torch import Tensor

from hubert_lightning import Units
from hubert_lightning.cli import main
from hubert_lightning.data.audio import read_waveform, resampled
from hubert_lightning.features.extractors import Extractor
from hubert_lightning.features.mfcc import mfcc
from hubert_lightning.frames import HOP, SAMPLE_RATE, WINDOW, num_frames, num_samples
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.model.statistics import statistics_of
from hubert_lightning.pretrained.load import encoder_fingerprint, load_encoder, load_hubert
from hubert_lightning.units.kmeans import assign
from hubert_lightning.units.kmeans_file import load_kmeans, save_kmeans
from hubert_lightning.units.unit_extractor import deduplicated

CLUSTERS = 20


@pytest.fixture(scope="module", params=["base", "large"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, train_cuts: CutSet) -> Path:
    """A tiny encoder with the norms of Base, or of Large, and the K-means of its second layer beside it."""
    folder = tmp_path_factory.mktemp(request.param)
    more = {"conv_norm": "layer", "normalize_waveform": True} if request.param == "large" else {}
    config = TINY.__dict__ | more
    torch.manual_seed(0)
    encoder = HubertEncoder(EncoderConfig(**config)).eval()
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"encoder": config}}, folder / "last.ckpt")
    with torch.no_grad():
        rows = encoder.features(read_waveform(train_cuts[0])[None], layer=2)[0]
    some = rows[torch.randperm(len(rows))[:CLUSTERS]]
    save_kmeans(
        folder / "kmeans.safetensors", [some], {"features": f"layer 2 of encoder {encoder_fingerprint(encoder)}"}
    )
    return folder / "last.ckpt"


@pytest.fixture(scope="module")
def units(model: Path) -> Units:
    return Units.from_pretrained(model, kmeans_of(model), device="cpu")


@pytest.fixture(scope="module")
def waveform(train_cuts: CutSet) -> Tensor:
    """About half a minute, louder and louder."""
    speech = torch.cat([read_waveform(cut) for cut in list(train_cuts)[:12]])
    return speech * torch.linspace(0.05, 1, len(speech))


def kmeans_of(model: Path) -> Path:
    return model.parent / "kmeans.safetensors"


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@torch.no_grad()
def test_units_are_the_nearest_centroids_of_the_layer_that_k_means_is_of(
    model: Path, units: Units, waveform: Tensor
) -> None:
    [centroids], _ = load_kmeans(kmeans_of(model))
    expected = assign(load_encoder(model).features(waveform[None], layer=2)[0], centroids)
    assert torch.equal(units(waveform, SAMPLE_RATE), expected)
    assert len(expected.unique()) > 5


def test_any_rate_and_any_number_of_channels_is_heard_as_it_is_read_from_a_file(units: Units, waveform: Tensor) -> None:
    assert torch.equal(units(torch.stack([waveform, waveform]), SAMPLE_RATE), units(waveform, SAMPLE_RATE))
    rough = np.stack([waveform[::2].numpy(), np.zeros(len(waveform[::2]), np.float32)])
    expected = units(resampled(torch.from_numpy(rough), 8_000).mean(dim=0), SAMPLE_RATE)
    assert torch.equal(units(rough, 8_000), expected)
    assert torch.equal(units(rough.astype(np.float64), 8_000), expected)


def test_mfcc_have_units_too(waveform: Tensor, tmp_path: Path) -> None:
    rows = mfcc(waveform)[::2]
    save_kmeans(tmp_path / "kmeans.safetensors", [rows[:CLUSTERS]], {"features": "mfcc"})
    found = Units.from_pretrained("mfcc", tmp_path / "kmeans.safetensors")(waveform, SAMPLE_RATE)
    assert torch.equal(found, assign(rows, rows[:CLUSTERS]))


@given(values=st.lists(st.integers(0, 3), min_size=1))
def test_runs_repeated_as_long_as_they_last_are_the_units(values: list[int]) -> None:
    found = deduplicated(torch.tensor(values))
    assert found.units.repeat_interleave(found.durations).tolist() == values
    assert (found.units[1:] != found.units[:-1]).all()


@pytest.mark.parametrize(
    ("audio", "rate", "sentence"),
    [
        (np.zeros(399, np.float32), 16_000, "399 samples at 16 kHz are too short"),
        (np.full(1000, np.nan), 16_000, "NaN or infinite"),
        (np.zeros((1000, 2), np.float32), 16_000, r"shape \(1000, 2\).*transpose"),
        (np.zeros((2, 1, 1000)), 16_000, r"shape \(2, 1, 1000\)"),
        (np.zeros(1000, np.int16), 16_000, "int16; give floats"),
        (np.zeros(1000), 16_001, "16001 Hz, no simple ratio"),
        (np.zeros(1000), 191_992, "191992 Hz, no simple ratio"),
        (np.zeros(1000), 2_000, "2000 Hz, too low"),
    ],
)
def test_what_is_no_audio_is_refused_in_a_sentence(units: Units, audio: np.ndarray, rate: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        units(audio, rate)


def test_a_model_and_a_k_means_that_do_not_belong_together_are_refused(model: Path, tmp_path: Path) -> None:
    def refused(sentence: str, source: dict[str, str], dim: int = 32, streams: int = 1, **given: Any) -> None:
        save_kmeans(tmp_path / "kmeans.safetensors", [torch.randn(4, dim) for _ in range(streams)], source)
        with pytest.raises(ValueError, match=sentence):
            Units.from_pretrained(**({"model": model, "kmeans": tmp_path / "kmeans.safetensors"} | given))

    of_this = f"layer 2 of encoder {encoder_fingerprint(load_encoder(model))}"
    refused("was fitted on layer 2 of encoder 0123, but .* gives layer 2", {"features": "layer 2 of encoder 0123"})
    refused("not on layer 1; leave --layer out", {"features": of_this}, layer=1)
    refused("does not state the layer", {})
    refused("layer 3 of an encoder of 2 layers", {}, layer=3)
    refused("K-means has 31 dimensions, but layer 1 of .* has 32", {}, dim=31, layer=1)
    refused("holds 2 K-means", {"features": of_this}, streams=2)
    refused("was fitted on mfcc; give 'mfcc' for the model", {"features": "mfcc"})
    refused("MFCCs have no layers", {}, model="mfcc", layer=1)
    spliced = {"features": "mfcc spliced over 3 frames", "parts": '["delta"]'}
    refused("a part of MFCCs .*, but units are clusters of whole MFCCs", spliced, model="mfcc")
    refused(
        "was fitted on layer .*, but MFCCs are asked for; give the model .*, or a K-means of MFCCs",
        {"features": of_this},
        model="mfcc",
    )
    refused("absent: no such file", {}, kmeans=tmp_path / "absent")
    refused("no kmeans.safetensors comes with this model; name a K-means of one of its layers", {}, kmeans=None)
    refused("mfcc: has no K-means of its own; name one of MFCCs with --kmeans", {}, model="mfcc", kmeans=None)
    save_kmeans(tmp_path / "kmeans.safetensors", [torch.randn(4, 32)], {})
    Units.from_pretrained(model, tmp_path / "kmeans.safetensors", layer=2)


@torch.no_grad()
def test_a_unit_of_residual_k_means_names_a_cluster_of_each_stage(
    model: Path, waveform: Tensor, tmp_path: Path
) -> None:
    encoder, stages = load_encoder(model), [torch.randn(4, 32), torch.randn(7, 32)]
    source = {"features": f"layer 2 of encoder {encoder_fingerprint(encoder)}", "residual": "2"}
    save_kmeans(tmp_path / "kmeans.safetensors", stages, source)
    short = waveform[: num_samples(100)]
    residual = Units.from_pretrained(model, tmp_path / "kmeans.safetensors", device="cpu")
    features = encoder.features(short[None], layer=2)[0]
    first = assign(features, stages[0])
    second = assign(features - stages[0][first], stages[1])
    np.testing.assert_array_equal(residual(short, SAMPLE_RATE), 7 * first + second)
    assert residual.num_clusters == 4 * 7
    residual.save_pretrained(tmp_path / "saved")
    again = Units.from_pretrained(tmp_path / "saved", device="cpu")
    np.testing.assert_array_equal(again(short, SAMPLE_RATE), 7 * first + second)


@torch.no_grad()
def test_a_long_recording_is_normalised_as_a_whole_and_the_same_from_a_file(
    model: Path, units: Units, waveform: Tensor, tmp_path: Path
) -> None:
    whole = units(waveform, SAMPLE_RATE)
    found = Units.from_pretrained(model, kmeans_of(model), device="cpu", window=14.0)(waveform, SAMPLE_RATE)
    encoder, statistics = load_hubert(model), statistics_of([waveform])
    part = waveform[None, : num_samples(700)]
    with_norms_of_whole = encoder.local_features(part, statistics=statistics)
    torch.testing.assert_close(
        with_norms_of_whole, encoder.local_features(waveform[None])[:, :700], atol=1e-5, rtol=1e-5
    )
    assert len(found) == len(whole) > 1400
    assert (found == whole).double().mean() > 0.9
    soundfile.write(tmp_path / "long.wav", waveform.numpy(), SAMPLE_RATE, subtype="FLOAT")
    out = tmp_path / "units.jsonl"
    given = ("--kmeans", kmeans_of(model), "--output", out, "--window", 14)
    assert run_verb("units", model, tmp_path / "long.wav", *given) == 0
    assert lines(out.read_text())[0]["units"] == found.tolist()


def streamed(units: Units, waveform: Tensor, sizes: list[int], **seconds: float) -> list[Tensor]:
    stream = units.stream(**seconds)
    ends = np.cumsum(sizes)
    known = [stream.push(chunk) for chunk in waveform.tensor_split(ends[ends < len(waveform)].tolist())]
    return [*known, stream.finish()]


def loudness_units() -> Units:
    """Of loudness, which takes no time."""

    def loudness(waveform: Tensor, length: Tensor, statistics: object = None) -> Tensor:
        return waveform.unfold(1, WINDOW, HOP).abs().mean(dim=2, keepdim=True)

    return Units(Extractor(loudness, "loudness", (1,)), torch.linspace(0, 0.2, CLUSTERS)[:, None])


@given(
    length=st.integers(0, 3 * SAMPLE_RATE),
    sizes=st.lists(st.integers(0, SAMPLE_RATE), max_size=20),
    step=st.sampled_from([0.02, 0.1, 0.5]),
    lookahead=st.sampled_from([0.0, 0.1, 0.5]),
    history=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_a_stream_gives_every_frame_once_whatever_the_chunks(
    waveform: Tensor, length: int, sizes: list[int], step: float, lookahead: float, history: float
) -> None:
    units, heard = loudness_units(), waveform[-length:] if length else waveform[:0]
    found = torch.cat(streamed(units, heard, sizes, step=step, lookahead=lookahead, history=history))
    assert len(found) == num_frames(length)
    if len(found):
        assert torch.equal(found, units(heard, SAMPLE_RATE))


@pytest.mark.parametrize("sizes", [[1] * 50 + [333] * 300, [70_001, 3]])
def test_a_stream_of_an_encoder_does_not_depend_on_the_chunks(units: Units, waveform: Tensor, sizes: list[int]) -> None:
    heard = waveform[: 5 * SAMPLE_RATE + 100]
    found = torch.cat(streamed(units, heard, sizes, step=0.5, history=1.0))
    assert torch.equal(found, torch.cat(streamed(units, heard, [], step=0.5, history=1.0)))
    assert len(found) == num_frames(len(heard))


def test_what_is_finished_in_one_step_has_the_units_of_the_whole(units: Units, waveform: Tensor) -> None:
    heard = waveform[: 3 * SAMPLE_RATE]
    *early, last = streamed(units, heard, [5_000] * 9, step=2.5, lookahead=1.0)
    assert sum(map(len, early)) == 0
    assert torch.equal(last, units(heard, SAMPLE_RATE))


def test_mfcc_of_a_stream_are_those_of_the_whole(waveform: Tensor, tmp_path: Path) -> None:
    heard = waveform[: 4 * SAMPLE_RATE]
    save_kmeans(tmp_path / "kmeans.safetensors", [mfcc(heard)[::20][:CLUSTERS]], {"features": "mfcc"})
    units = Units.from_pretrained("mfcc", tmp_path / "kmeans.safetensors")
    found = torch.cat(streamed(units, heard, [4_000] * 20, step=0.5, lookahead=0.1, history=0.1))
    assert torch.equal(found, units(heard, SAMPLE_RATE))


def test_a_frame_is_given_as_soon_as_its_lookahead_was_heard(units: Units, waveform: Tensor) -> None:
    stream = units.stream(step=0.5, lookahead=0.3)
    needed = num_samples(25 + 15)
    assert len(stream.push(waveform[: needed - 1])) == 0
    assert len(stream.push(waveform[needed - 1 : needed])) == 25
    assert len(stream.push(waveform[needed : needed + 25 * HOP])) == 25
    assert stream.latency == pytest.approx(0.8)


def test_the_memory_of_a_stream_does_not_grow(waveform: Tensor) -> None:
    stream = loudness_units().stream(step=0.5, lookahead=0.2, history=1.0)
    for chunk in waveform.split(1600):
        stream.push(chunk)
        assert len(stream._audio) <= stream.longest + 25 * HOP


def test_a_stream_that_makes_no_sense_is_refused(units: Units) -> None:
    with pytest.raises(ValueError, match="a step of at least one frame"):
        units.stream(step=0.01)
    with pytest.raises(ValueError, match="not negative"):
        units.stream(history=-1.0)
    stream = units.stream()
    assert len(stream.finish()) == 0
    with pytest.raises(ValueError, match="finished"):
        stream.push(torch.zeros(10))


def test_every_format_tells_the_same_units(model: Path, units: Units, speech: list[Path], tmp_path: Path) -> None:
    expected = {path.stem: units(read_samples(path), SAMPLE_RATE) for path in speech}
    for format in ("jsonl", "kaldi", "npz"):
        for more in ((), ("--deduplicate",)):
            out = tmp_path / "out" / f"{format}{len(more)}"
            given = ("--kmeans", kmeans_of(model), "--format", format, "--output", out, *more)
            assert run_verb("units", model, *speech, *given) == 0
    runs = {name: deduplicated(of) for name, of in expected.items()}

    def read(name: str) -> dict[str, list[int]]:
        fields = [line.split() for line in (tmp_path / "out" / name).read_text().splitlines()]
        return {name: list(map(int, numbers)) for name, *numbers in fields}

    plain, shorter = (lines((tmp_path / "out" / f"jsonl{number}").read_text()) for number in (0, 1))
    assert plain == [{"file": str(path), "units": expected[path.stem].tolist()} for path in speech]
    assert [line["durations"] for line in shorter] == [runs[path.stem].durations.tolist() for path in speech]
    assert [line["units"] for line in shorter] == [runs[path.stem].units.tolist() for path in speech]
    assert read("kaldi0") == {name: of.tolist() for name, of in expected.items()}
    assert read("kaldi1") == {name: of.units.tolist() for name, of in runs.items()}
    assert read("kaldi1.durations") == {name: of.durations.tolist() for name, of in runs.items()}
    with np.load(tmp_path / "out" / "npz0") as arrays:
        assert {name: arrays[name].tolist() for name in arrays} == {name: of.tolist() for name, of in expected.items()}
    with np.load(tmp_path / "out" / "npz1") as arrays:
        assert arrays["b"].tolist() == runs["b"].units.tolist()
        assert arrays["b.durations"].tolist() == runs["b"].durations.tolist()


def test_a_recording_of_two_minutes_has_the_units_of_the_whole(model: Path, waveform: Tensor, units: Units) -> None:
    """It is encoded at once, and convolved in pieces."""
    long = waveform.repeat(5)[: 120 * SAMPLE_RATE + 77]
    encoder, ([centroids], source) = load_encoder(model), load_kmeans(kmeans_of(model))
    layer = int(source["features"].split()[1])
    with torch.no_grad():
        features = encoder.features(long[None], layer=layer)[0]
    nearest, second = torch.cdist(features, centroids).topk(2, dim=1, largest=False).values.T
    clear = second - nearest > 1e-4  # rounding decides between the others
    found = units(long, SAMPLE_RATE)
    assert clear.float().mean() > 0.99
    assert torch.equal(found[clear], assign(features, centroids)[clear])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-", "--history", "1e9"], "their sum is encoded at once; keep it to 600 s"),
        (["-", "--window", "10"], "window are options for files, not for standard input; leave them out"),
        (
            ["a.wav", "--step", "1"],
            "step, lookahead and history are options for standard input, not for files",
        ),
        (["a.wav", "--output", "a.npz"], "a.npz: the format is jsonl; choose --format npz"),
    ],
)
def test_options_that_do_nothing_or_too_much_are_refused(
    model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["units", str(model), *arguments, "--kmeans", str(kmeans_of(model))])
    assert end.value.code == 2
    assert sentence in capsys.readouterr().err


def test_files_of_one_name_have_ids_of_their_own_without_spaces(
    model: Path, speech: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "new folder").mkdir()
    shutil.copy(speech[0], tmp_path / "new folder" / "a.wav")
    shutil.copy(speech[0], tmp_path / "an d.wav")
    out = tmp_path / "units.txt"
    given = ("--kmeans", kmeans_of(model), "--format", "kaldi", "--output", out)
    assert run_verb("units", model, tmp_path, *given) == 0
    found = [line.split()[0] for line in out.read_text().splitlines()]
    folder = re.sub(r"\s", "_", str(tmp_path)).lstrip("/")  # an archive should not lead outside of itself
    assert sorted(found) == sorted(["b", "c", "an_d", f"{folder}/a.wav", f"{folder}/new_folder/a.wav"])


def test_whatever_is_wrong_with_some_files_the_others_have_units(
    model: Path, units: Units, speech: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.wav").touch()
    soundfile.write(tmp_path / "blink.wav", np.zeros(100), SAMPLE_RATE)
    bad = [tmp_path / "empty.wav", tmp_path / "blink.wav", tmp_path / "absent.wav"]
    assert run_verb("units", model, *bad, *speech, "--kmeans", kmeans_of(model)) == 1
    told = capfd.readouterr()
    assert lines(told.out) == [
        {"file": str(path), "units": units(read_samples(path), SAMPLE_RATE).tolist()} for path in speech
    ]
    for sentence in ("empty.wav: empty: it has no bytes", "blink.wav: too short: 100 samples", "absent.wav: not there"):
        assert sentence in told.err
    assert "hubert: 3 of 6 files failed" in told.err
    assert re.search(r"hubert: [\d.]+ s of audio in [\d.]+ s, [\d.]+ × real time", told.err)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["a.wav", "--format", "npz"], "npz needs a file; name it with --output"),
        (["a.wav", "--format", "kaldi", "--deduplicate"], "kaldi with durations needs a file"),
        (["-", "a.wav"], "give - alone"),
        (["-", "--format", "kaldi"], "leave out output, format and deduplicate"),
        (["-", "--step", "0"], "a step of at least one frame"),
    ],
)
def test_what_cannot_be_done_is_said_before_work_starts(
    model: Path, speech: list[Path], capsys: pytest.CaptureFixture[str], args: list[str], sentence: str
) -> None:
    args = [str(speech[0]) if arg == "a.wav" else arg for arg in args]
    assert run_verb("units", model, *args, "--kmeans", kmeans_of(model)) == 2
    assert sentence in capsys.readouterr().err


def test_standard_input_is_given_units_line_by_line_and_its_latency_is_told(
    model: Path,
    units: Units,
    waveform: Tensor,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pcm = (waveform[: 3 * SAMPLE_RATE + 200] * 2**15).clamp(-(2**15), 2**15 - 1).to(torch.int16)
    heard = pcm.float() / 2**15
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(pcm.numpy().astype("<i2").tobytes())))
    given = ("--step", 0.5, "--lookahead", 0.2, "--history", 1)
    assert run_verb("units", model, "-", "--kmeans", kmeans_of(model), *given) == 0
    told = capsys.readouterr()
    found = lines(told.out)
    assert [line["start"] for line in found] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert [line["end"] for line in found] == [0.5, 1.0, 1.5, 2.0, 2.5, round(0.02 * num_frames(len(heard)), 2)]
    expected = torch.cat(streamed(units, heard, [], step=0.5, lookahead=0.2, history=1.0))
    assert [unit for line in found for unit in line["units"]] == expected.tolist()
    for what in ("units come", "units came"):
        assert re.search(what + r" \d\.\d\d s late: step 0.5 s, lookahead 0.2 s, computation", told.err)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\0" * 700)))
    assert run_verb("units", model, "-", "--kmeans", kmeans_of(model)) == 2
    assert "350 samples on standard input are too short" in capsys.readouterr().err


@pytest.mark.slow
def test_a_line_comes_before_the_audio_ends(waveform: Tensor, tmp_path: Path) -> None:
    kmeans = tmp_path / "kmeans.safetensors"
    save_kmeans(kmeans, [mfcc(waveform[: 4 * SAMPLE_RATE])[::20][:CLUSTERS]], {"features": "mfcc"})
    command = [sys.executable, "-m", "hubert_lightning", "units", "mfcc", "-", "--kmeans", kmeans]
    process = subprocess.Popen([*map(str, command), "--step", "0.5"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write((waveform[: 2 * SAMPLE_RATE] * 2**15).to(torch.int16).numpy().tobytes())
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["end"] == 0.5
    rest, _ = process.communicate()
    assert process.returncode == 0
    assert lines(rest.decode())[-1]["end"] == round(0.02 * num_frames(2 * SAMPLE_RATE), 2)
