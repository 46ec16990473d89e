"""Uploads that cannot be used are refused with the sentence of the verbs, and leave nothing behind."""

import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from fastapi.testclient import TestClient
from helpers import noise_with_pauses, run_verb
from served import ServedFiles, served_with

from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.examine import examine
from hubert_lightning.frames import SAMPLE_RATE
from hubert_lightning.serving.limits import Limits
from hubert_lightning.serving.models import Models
from hubert_lightning.serving.recordings import in_memory


def wav(samples: np.ndarray, rate: int = SAMPLE_RATE, subtype: str = "PCM_16") -> bytes:
    content = BytesIO()
    soundfile.write(content, samples, rate, subtype, format="WAV")
    return content.getvalue()


def silent_film() -> bytes:
    content = BytesIO()
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for _ in range(10):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return content.getvalue()


NOISE = noise_with_pauses(8).numpy()
BAD_UPLOADS = {
    "text.mp3": (b"this is no audio, " * 100, 415),
    "film.mp4": (silent_film(), 415),
    "cut.wav": (wav(NOISE)[:100_000], 422),
    "blink.wav": (wav(NOISE[:100]), 422),
    "numbers.wav": (wav(np.full(16_000, np.nan), subtype="FLOAT"), 422),
    "slow.wav": (wav(NOISE, 2_000), 422),
}


@pytest.mark.parametrize("name", BAD_UPLOADS)
def test_a_bad_upload_is_refused_with_the_sentence_of_the_verb(
    client: TestClient, served: ServedFiles, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, status = BAD_UPLOADS[name]
    (tmp_path / name).write_bytes(content)
    assert run_verb("transcribe", served.model, tmp_path / name) == 1
    [reason] = re.findall(rf"hubert: {tmp_path / name}: (.*)\n", capsys.readouterr().err)
    for answer in (
        client.post("/transcribe", files={"file": (name, content)}),
        client.post("/units", content=content),
    ):
        assert answer.status_code == status
        assert answer.json() == {"detail": f"the upload: {reason}"}


FILE = b'--x\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\n1\r\n'


@pytest.mark.parametrize("content", [b"", b"--x--\r\n", FILE])
def test_an_upload_without_content_is_refused(client: TestClient, content: bytes) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=x"} if content else {}
    answer = client.post("/transcribe", content=content, headers=headers)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("the form holds no whole file" if content else "the upload is empty")


@pytest.mark.parametrize(
    ("content_type", "content", "sentence"),
    [
        ("multipart/form-data", b"x", "the form cannot be read (Missing boundary in multipart); send one file"),
        ("multipart/form-data; boundary=x", b"no form", "the form cannot be read ("),
        (
            "multipart/form-data; boundary=x",
            FILE * 2 + b"--x--\r\n",
            "the form cannot be read (Too many files",
        ),
    ],
)
def test_a_form_that_is_none_is_refused(client: TestClient, content_type: str, content: bytes, sentence: str) -> None:
    answer = client.post("/units", content=content, headers={"Content-Type": content_type})
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith(sentence)


def test_too_many_bytes_are_refused_announced_or_not(models: Models) -> None:
    content = wav(NOISE)

    def chunks() -> Iterator[bytes]:
        for first in range(0, len(content), 10_000):
            yield content[first : first + 10_000]

    with served_with(models, Limits(max_upload=0.1)) as client:
        answers = [
            client.post("/transcribe", content=content),
            client.post("/transcribe", content=chunks()),
            client.post("/transcribe", files={"file": content}),
        ]
        assert client.post("/transcribe", content=wav(NOISE[:16_000])).status_code == 200
    for answer in answers:
        assert answer.status_code == 413
        assert answer.json()["detail"].startswith("the upload has more than 0.1 MB; send it in parts")


def test_a_recording_that_is_too_long_is_not_decoded_to_its_end(models: Models, tmp_path: Path) -> None:
    """Two hours of silence, which are small as FLAC."""
    with soundfile.SoundFile(tmp_path / "long.flac", "w", 8_000, 1) as file:
        for _ in range(2):
            file.write(np.zeros(8_000 * 3_600, np.int16))
    with served_with(models, Limits(max_duration=60, max_waiting=60)) as client:
        answer = client.post("/transcribe", content=(tmp_path / "long.flac").read_bytes())
        assert client.post("/transcribe", content=wav(NOISE)).status_code == 200
    assert answer.status_code == 413
    assert answer.json()["detail"] == "the upload: too long: it lasts more than 60 s; cut it into parts"


def test_a_recording_of_many_channels_at_a_high_rate_is_refused(client: TestClient) -> None:
    answer = client.post("/units", content=wav(np.zeros((960, 16)), 96_000))
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("the upload: too wide: it has 16 channels at 96000 Hz")


def test_an_upload_in_memory_has_the_samples_of_its_file(tmp_path: Path) -> None:
    stereo = np.stack([NOISE, NOISE[::-1]], axis=1)
    for number, (rate, subtype) in enumerate([(16_000, "PCM_16"), (44_100, "PCM_24"), (8_000, "FLOAT")]):
        path = tmp_path / f"{number}.wav"
        soundfile.write(path, stereo, rate, subtype)
        [cut], _, _ = examine([path])
        copy = in_memory(cut)
        assert copy.num_samples == cut.num_samples
        assert torch.equal(read_waveform(copy), read_waveform(cut))
        assert torch.equal(read_waveform(copy, 1_600, 3_200), read_waveform(cut, 1_600, 3_200))


def test_remarks_on_a_recording_are_part_of_the_answer(client: TestClient) -> None:
    answer = client.post("/transcribe", content=wav(NOISE[::2], 8_000))
    assert answer.status_code == 200
    assert [remark.partition(":")[0] for remark in answer.json()["remarks"]] == ["low rate"]


def test_nothing_of_an_upload_is_left(
    models: Models, served: ServedFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with served_with(models) as client:
        for content in (served.recordings[0].read_bytes(), b"no audio", wav(NOISE)[:100_000]):
            client.post("/transcribe", files={"file": ("../../a.wav", content)})
            client.post("/units", content=content)
        assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []
        assert len(list(tmp_path.iterdir())) == 1  # the folder of the service
    assert list(tmp_path.iterdir()) == []
