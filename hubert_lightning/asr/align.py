"""Times of the words of a known text, in Python."""

from collections.abc import Sequence
from pathlib import Path
from typing import overload

from hubert_lightning.asr.transcriber import Audio, Audios, Transcriber
from hubert_lightning.asr.transcript_formats import Transcript


@overload
def align(
    model: Path | str | Transcriber, recording: Audio, text: str, sample_rate: int | None = None
) -> Transcript: ...


@overload
def align(
    model: Path | str | Transcriber,
    recording: Audios,
    text: Sequence[str],
    sample_rate: int | None = None,
) -> list[Transcript]: ...


def align(
    model: Path | str | Transcriber,
    recording: Audio | Audios,
    text: str | Sequence[str],
    sample_rate: int | None = None,
) -> Transcript | list[Transcript]:
    """Find the time of each word of a known text, as `Transcriber.align` does.

    Args:
        model: Fine-tuned checkpoint, a transformers directory or Hub name of a HubertForCTC, or a `Transcriber`.
        recording: File or waveform, or a list of them.
        text: Text of the recording, or a list of texts.
        sample_rate: Samples per second of the waveforms.

    Returns:
        The text, normalised as the model's transcripts, with its words; for a list, in its order.

    Raises:
        UserError: The model cannot be opened, or as `Transcriber.align` raises.
    """
    transcriber = model if isinstance(model, Transcriber) else Transcriber.from_pretrained(model)
    return transcriber.align(recording, text, sample_rate)  # type: ignore[arg-type]  # one of each, or a list of each
