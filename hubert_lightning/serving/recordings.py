"""Uploads of a service: received to temporary files, checked and decoded as files of the verbs are.

Decoded audio is kept in memory at 16 kHz, 64 kB a second, and the file is removed. So the thread that computes never
waits for a codec, and no upload outlives its request.
"""

import asyncio
import os
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from shutil import copyfileobj
from typing import NamedTuple

import av
import soundfile
import torch
from fastapi import HTTPException, Request
from lhotse.cut import Cut
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.audio_folder import AUDIO_SUFFIXES, AudioFile
from hubert_lightning.data.examine import cut_in_memory, cuts_of
from hubert_lightning.data.probe import TOO_LONG, Sound, probe
from hubert_lightning.data.sound_files import close_decoders, open_audio
from hubert_lightning.errors import UserError
from hubert_lightning.frames import SAMPLE_RATE
from hubert_lightning.serving.limits import Limits

UPLOAD = "the upload"
"""Name of an upload in sentences; the client's name of it is not repeated."""
BLOCK_SAMPLES = 60 * SAMPLE_RATE
"""Samples, a minute, that are decoded at once."""
MAX_VALUES = 768_000
"""Sampling rate times number of channels, 8 channels at 96 kHz, which bounds the memory of a decoded minute."""
NOT_AUDIO = "unreadable"
"""Beginning of the reason against a file that no decoder knows."""


class CheckedUpload(NamedTuple):
    """An upload that can be used.

    Attributes:
        cut: The recording, counted at 16 kHz.
        remarks: Unusual properties, each as a kind, a colon, and a sentence.
    """

    cut: Cut
    remarks: tuple[str, ...]


@asynccontextmanager
async def received(request: Request, limits: Limits, folder: Path) -> AsyncIterator[Path]:
    """Receive the recording of a request, as the body or as the file of a form; it is removed at the end.

    Args:
        request: Request.
        limits: Largest size, and patience.
        folder: Folder of temporary files.

    Yields:
        Path of the recording. Its name is random; only its suffix is that of the upload, if it is a known one.

    Raises:
        HTTPException: The upload is too large, stalled, or not a form with a file.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limits.max_bytes:
        raise _too_large(limits)
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    path: Path | None = None
    try:
        if content_type == "multipart/form-data":
            path = await _received_form(request, limits, folder)
        else:
            path = await run_in_threadpool(_new_file, folder, "")
            await _write(_body(request, limits), path)
        yield path
    finally:
        if path is not None:
            path.unlink(missing_ok=True)


async def _received_form(request: Request, limits: Limits, folder: Path) -> Path:
    try:
        form = await MultiPartParser(request.headers, _body(request, limits), max_files=1, max_fields=16).parse()
    except MultiPartException as error:
        raise HTTPException(
            400, f"the form cannot be read ({error.message.rstrip('.')}); send one file, as curl -F file=@a.wav does"
        ) from error
    try:
        upload = next((value for value in form.values() if isinstance(value, UploadFile)), None)
        if upload is None:
            raise HTTPException(422, "the form holds no whole file; send the recording in the field 'file'")
        path: Path = await run_in_threadpool(_copied, upload, folder)
        return path
    finally:
        await form.close()


def _copied(upload: UploadFile, folder: Path) -> Path:
    path = _new_file(folder, upload.filename or "")
    with path.open("wb") as file:
        copyfileobj(upload.file, file)
    return path


def _new_file(folder: Path, name: str) -> Path:
    suffix = os.path.splitext(name)[1].lower()  # by which headerless formats are known
    descriptor, path = tempfile.mkstemp(suffix if suffix in AUDIO_SUFFIXES else "", dir=folder)
    os.close(descriptor)
    return Path(path)


async def _write(body: AsyncGenerator[bytes, None], path: Path) -> None:
    with path.open("wb") as file:
        async for chunk in body:
            await run_in_threadpool(file.write, chunk)
        await run_in_threadpool(file.flush)


async def _body(request: Request, limits: Limits) -> AsyncGenerator[bytes, None]:
    stream, size = request.stream(), 0
    while True:
        try:
            async with asyncio.timeout(limits.patience):
                chunk = await anext(stream, None)
        except TimeoutError as error:
            raise HTTPException(
                408, f"the upload stopped for {limits.patience:g} s; send it again", {"Connection": "close"}
            ) from error
        if chunk is None:
            return
        size += len(chunk)
        if size > limits.max_bytes:
            raise _too_large(limits)
        yield chunk


def _too_large(limits: Limits) -> HTTPException:
    return HTTPException(
        413,
        f"the upload has more than {limits.max_upload:g} MB; send it in parts, or compressed, such as in Opus or FLAC",
    )


def checked(path: Path, max_duration: float) -> CheckedUpload:
    """Decode an upload to its end, with the checks of the verbs; runs in a thread.

    Args:
        path: Temporary file.
        max_duration: Seconds of the longest usable recording.

    Raises:
        HTTPException: It is no audio (415), too long (413), or cannot be used (422).
    """
    if not path.stat().st_size:
        raise HTTPException(
            422, "the upload is empty; send the recording as the body, or as a file of multipart/form-data"
        )
    try:
        _check_width(path)
        sound = probe(path, max_duration)
    finally:
        close_decoders()
    cuts, refusals = cuts_of([AudioFile(path, UPLOAD, None, None)], {path: sound}, None)
    if refusals:
        reason = refusals[0].reason.replace(str(path), UPLOAD)
        status = 413 if reason.startswith(TOO_LONG) else 415 if reason.startswith(NOT_AUDIO) else 422
        raise HTTPException(status, f"{UPLOAD}: {reason}")
    assert isinstance(sound, Sound)
    return CheckedUpload(cuts[0], sound.remarks)


def _check_width(path: Path) -> None:
    """Refuse a recording whose decoded minutes would fill the memory; other mistakes are left to `probe`."""
    try:
        with open_audio(str(path)) as audio:
            rate, channels = audio.rate, audio.num_channels
    except (OSError, ValueError, soundfile.SoundFileError, av.FFmpegError):
        return
    if rate * channels > MAX_VALUES:
        raise HTTPException(
            422,
            f"{UPLOAD}: too wide: it has {channels} channels at {rate} Hz, and at most {MAX_VALUES} samples a second "
            "are read; convert it to 16 kHz and one channel",
        )


def in_memory(cut: Cut) -> Cut:
    """Copy a recording to memory at 16 kHz, sample by sample what the verbs read of the file; runs in a thread.

    Args:
        cut: Recording in a file.

    Raises:
        UserError: The file has become unreadable.
    """
    samples = torch.empty(cut.num_samples)
    try:
        for first in range(0, cut.num_samples, BLOCK_SAMPLES):
            size = min(BLOCK_SAMPLES, cut.num_samples - first)
            samples[first : first + size] = read_waveform(cut, first, size)
    except UserError as error:
        raise UserError(str(error).replace(cut.recording.sources[0].source, UPLOAD)) from error
    finally:
        close_decoders()
    return cut_in_memory(cut.id, samples)
