"""Samples of a cut or a segment of it, at 16 kHz with one channel, from files of any rate and number of channels.

lhotse's own `load_audio` repeats up to half a second of audio where a file is shorter than in its manifest, and
resamples a segment without the samples around it. Here a segment equals the same slice of the whole recording at any
rate, and a file that is shorter than in its manifest is an error.
"""

import os
import stat
from functools import lru_cache
from math import ceil, gcd

import av
import numpy as np
import soundfile
import torch
from lhotse.audio import AudioSource
from lhotse.cut import Cut, MonoCut, MultiCut
from torch import Tensor

from hubert_lightning.data.coded_audio import CodedAudio
from hubert_lightning.data.cut_rows import SHAR
from hubert_lightning.data.ffmpeg import File
from hubert_lightning.data.resampling import Resampler
from hubert_lightning.data.sound_files import open_audio, reason_of
from hubert_lightning.errors import UserError
from hubert_lightning.files import kind_of
from hubert_lightning.frames import SAMPLE_RATE, seconds_to_samples

LOWEST_RATE = 4_000
"""Lowest usable sampling rate in Hz."""
MAX_WEIGHTS = 12_000_000
"""Weights of a resampling filter, 48 MB: enough for 44056 Hz, which shares a divisor of 8 with 16 kHz."""
END_TOLERANCE = 320
"""Samples at 16 kHz (20 ms) by which decoders of lossy formats disagree on the end of a file."""
FILTER_REACH = 64
"""Samples at 16 kHz: more than half the length of the resampling filter, for any rate above 1.6 kHz."""


def read_waveform(cut: Cut, first_sample: int = 0, num_samples: int | None = None) -> Tensor:
    """Read the audio of a cut, or of a segment of it, at 16 kHz with its channels averaged.

    Args:
        cut: Cut of a recording, counted at 16 kHz.
        first_sample: First sample of the segment at 16 kHz, counted from the start of the cut.
        num_samples: Length of the segment at 16 kHz; default: to the end of the cut.

    Returns:
        (samples,) float32 in [-1, 1].

    Raises:
        UserError: The cut has no recording or is not counted at 16 kHz, the segment is not inside it, or the file is
            missing, corrupt or too short.
    """
    if not isinstance(cut, (MonoCut, MultiCut)) or not cut.has_recording:
        raise UserError(f"{cut.id}: a {type(cut).__name__} has no recording to read; train on plain cuts")
    if cut.sampling_rate != SAMPLE_RATE:
        raise UserError(
            f"{cut.id}: the manifest counts samples at {cut.sampling_rate} Hz, not at {SAMPLE_RATE} Hz; make it with "
            "`hubert prepare`, or call `.resample(16000)` on its cuts"
        )
    if num_samples is None:
        num_samples = cut.num_samples - first_sample
    if not 0 <= first_sample <= first_sample + num_samples <= cut.num_samples:
        raise UserError(
            f"{cut.id}: samples {first_sample} to {first_sample + num_samples} were asked for, but the cut has "
            f"{cut.num_samples}; ask for a segment inside it"
        )
    if num_samples == 0:
        return torch.zeros(0)
    for transform in cut.recording.transforms or []:
        name = transform["name"] if isinstance(transform, dict) else type(transform).__name__
        if name != "Resample":
            raise UserError(f"{cut.id}: {name} is not applied when audio is read; save the changed audio to files")
    channels = {cut.channel} if isinstance(cut.channel, int) else set(cut.channel)
    first, length = seconds_to_samples(cut.start) + first_sample, cut.recording.num_samples
    if not any(channels.intersection(source.channels) for source in cut.recording.sources):
        raise UserError(f"{cut.id}: its recording has no channel {cut.channel}; name one that it has")
    waveforms = torch.cat(
        [
            _read_source(
                cut.id, source, length, first, num_samples, [source.channels.index(number) for number in present]
            )
            for source in cut.recording.sources
            if (present := sorted(channels.intersection(source.channels)))
        ]
    )
    return waveforms[0] if len(waveforms) == 1 else waveforms.mean(dim=0)


def resampled(waveform: Tensor, rate: int) -> Tensor:
    """Resample audio to 16 kHz.

    Args:
        waveform: (…, samples) at `rate`.
        rate: Sampling rate in Hz, for which `unusable` returns None.

    Returns:
        (…, samples) at 16 kHz.
    """
    return waveform if rate == SAMPLE_RATE else _resampler(rate)(waveform.contiguous())


def mono_samples(waveform: Tensor | np.ndarray, rate: int) -> Tensor:
    """Convert audio in memory to 16 kHz with its channels averaged.

    Args:
        waveform: (samples,) or (channels, samples), floats from -1 to 1.
        rate: Samples per second.

    Returns:
        (samples,) float32, on the CPU.

    Raises:
        UserError: The waveform is not audio.
    """
    samples = torch.as_tensor(waveform).detach().cpu()
    if not samples.is_floating_point():
        dtype = str(samples.dtype).removeprefix("torch.")
        raise UserError(f"samples are {dtype}; give floats from -1 to 1, such as int16 divided by 32768")
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and len(samples) > samples.shape[1]):
        raise UserError(
            f"a waveform of shape {tuple(samples.shape)}, not (samples,) or (channels, samples); transpose it"
        )
    if not samples.isfinite().all():
        raise UserError("samples are NaN or infinite; correct the audio")
    if reason := unusable(rate):
        raise UserError(f"audio {reason}")
    samples = resampled(samples.float(), rate)
    return samples if samples.ndim == 1 else samples.mean(dim=0)


def unusable(rate: int) -> str | None:
    """Return the reason why audio at a sampling rate cannot be used, or None."""
    if rate < LOWEST_RATE:
        return f"sampled at {rate} Hz, too low for speech"
    divisor = gcd(rate, SAMPLE_RATE)
    if divisor < 8 or (SAMPLE_RATE // divisor) * (rate // divisor) > MAX_WEIGHTS:
        # the polyphase filter has one phase for every sample of the common period: gigabytes at worst
        return f"sampled at {rate} Hz, no simple ratio to 16 kHz: convert it to a usual rate"
    return None


def _read_source(
    cut_id: str, source: AudioSource, length: int, first: int, num_samples: int, columns: list[int]
) -> Tensor:
    """Channels of one file from sample `first` at 16 kHz on: (channels, samples); `length` counts the whole file."""

    def is_whole(num_samples: int, rate: int) -> bool:
        return abs(num_samples * SAMPLE_RATE / rate - length) <= 1

    try:
        with open_audio(_readable(source), is_whole) as file:
            rate = file.rate
            if reason := unusable(rate):
                raise OSError(reason)
            # Every `step` samples at 16 kHz coincide with `file_step` samples of the file. A segment between such
            # samples gives the resampling filter the same phase as in the whole file.
            step, file_step = SAMPLE_RATE // gcd(rate, SAMPLE_RATE), rate // gcd(rate, SAMPLE_RATE)
            reach = 0 if rate == SAMPLE_RATE else FILTER_REACH
            begin = max(first - reach, 0) // step
            end = ceil((first + num_samples + reach) / step)
            audio = file.read(begin * file_step, (end - begin) * file_step)  # (samples, channels)
    except (OSError, ValueError, soundfile.SoundFileError, av.FFmpegError) as error:
        raise UserError(
            f"{cut_id}: {_name_of(source)} cannot be read ({reason_of(error)}); restore the file, or run "
            "`hubert prepare` again to leave it out"
        ) from error
    offset = first - begin * step
    missing = offset + num_samples - ceil(len(audio) * step / file_step)
    if 0 < missing <= END_TOLERANCE and isinstance(file, CodedAudio):
        audio = np.pad(audio, ((0, ceil(missing * file_step / step)), (0, 0)))
    elif missing > 0:
        raise UserError(
            f"{cut_id}: {_name_of(source)} ends at {begin * file_step / rate + len(audio) / rate:.3f} s, before the "
            f"{(first + num_samples) / SAMPLE_RATE:.3f} s that its manifest counts on; restore the file, or run "
            "`hubert prepare` again"
        )
    channels = torch.from_numpy(audio)
    if audio.shape[1] != len(columns):
        channels = channels[:, columns]
    return resampled(channels.T, rate)[:, offset : offset + num_samples]  # (channels, samples)


def _readable(source: AudioSource) -> File:
    if source.type == "memory" and isinstance(source.source, bytes):
        return source.source
    if source.type == "file" and isinstance(source.source, str):
        _check_regular(source.source)
        return source.source
    if source.type == "shar" and isinstance(source.source, str) and (part := SHAR.fullmatch(source.source)):
        _check_regular(part["archive"])
        with open(part["archive"], "rb") as file:
            end = int(part["offset"]) + int(part["size"])
            if end > (size := os.fstat(file.fileno()).st_size):
                raise OSError(f"the archive has {size} bytes, and its audio ends at byte {end}")
            file.seek(int(part["offset"]))
            return file.read(int(part["size"]))
    raise OSError(f"audio of type {source.type!r} is not read here, only files and Shar archives")


def _check_regular(path: str) -> None:
    """Refuse a pipe, which would wait for a writer, and a device, which has no end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"it is {kind_of(path)}")


def _name_of(source: AudioSource) -> str:
    return "audio in memory" if source.type == "memory" else str(source.source)


@lru_cache(maxsize=8)
def _resampler(rate: int) -> Resampler:
    return Resampler(rate, SAMPLE_RATE)
