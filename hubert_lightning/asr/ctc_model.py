"""A fine-tuned model as a function, without Lightning: audio in, log-probabilities of tokens out."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from lhotse.cut import Cut
from torch import Tensor, nn

from hubert_lightning.features.extract import extract_cuts
from hubert_lightning.features.extractors import Extractor, length_if_padded
from hubert_lightning.features.windows import quiet_windows
from hubert_lightning.frames import Clock, in_frames
from hubert_lightning.model.convolutions import WaveformStatistics
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.model.windows import WindowLayout
from hubert_lightning.pretrained.load import encoder_fingerprint, read_weights
from hubert_lightning.pretrained.weights import build_ctc_head, build_encoder
from hubert_lightning.vocabulary import Vocabulary

WINDOW_FRAMES = 1_500
"""Frames of 20 ms that are encoded at once, 30 s: no training example is longer, and memory stays small."""


class CTCModel(nn.Module):
    """An encoder with a CTC head.

    Args:
        encoder: Encoder.
        head: Linear layer from features to tokens.
        vocabulary: Tokens of the head.
    """

    def __init__(self, encoder: HubertEncoder, head: nn.Linear, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.encoder, self.head, self.vocabulary = encoder, head, vocabulary

    @property
    def clock(self) -> Clock:
        """Clock of the encoder."""
        return self.encoder.config.clock

    def forward(self, waveform: Tensor, length: Tensor | None = None, *, ignore_padding: bool = False) -> Tensor:
        """Compute log-probabilities of the tokens.

        Args:
            waveform: (batch, samples), 16 kHz.
            length: (batch,), samples before padding; None if nothing is padded.
            ignore_padding: Whether the group norm of Base ignores padding; in the reference, it includes padding.

        Returns:
            (batch, frames, tokens) float32.
        """
        logits: Tensor = self.head(self.encoder(waveform, length, ignore_padding=ignore_padding))
        return logits.float().log_softmax(dim=-1)

    def fingerprint(self) -> str:
        """Compute a short name that models share only if encoder, head and vocabulary are the same."""
        digest = hashlib.sha256(encoder_fingerprint(self.encoder).encode())
        digest.update(json.dumps(self.vocabulary.settings(), sort_keys=True).encode())
        for content in _contents(self.head.state_dict()):
            digest.update(content)
        return digest.hexdigest()[:16]


def weights_fingerprint(state: Mapping[str, Tensor]) -> str:
    """Compute a short name that only equal weights share.

    Args:
        state: State dict of a model.
    """
    digest = hashlib.sha256()
    for content in _contents(state):
        digest.update(content)
    return digest.hexdigest()[:16]


def _contents(state: Mapping[str, Tensor]) -> Iterator[bytes]:
    """Name and float32 values of each tensor."""
    for name, value in sorted(state.items()):
        yield name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes()


def load_ctc(path: Path | str) -> CTCModel:
    """Load a fine-tuned model in eval mode, on the CPU; its first token is the blank.

    Args:
        path: Anything that `pretrained.load.read_weights` opens and that has a CTC head.

    Raises:
        UserError: The file is corrupt, holds no fine-tuned model, or does not state the tokens of the CTC head.
    """
    path, weights = Path(path), read_weights(path)
    return CTCModel(build_encoder(weights, path), *build_ctc_head(weights, path)).eval()


def log_probabilities(
    model: CTCModel,
    groups: Sequence[Sequence[Cut]],
    *,
    batch_duration: float | None = None,
    progress: str | None,
    window_frames: int = WINDOW_FRAMES,
    num_workers: int = 0,
    precision: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Iterator[list[Tensor]]:
    """Compute log-probabilities of recordings of any length.

    Long recordings are encoded in windows that begin and end in pauses. The encoder sees a margin around each window,
    so that no word is lost or doubled.

    Args:
        model: Model, on the device that encodes.
        groups: Groups of recordings.
        batch_duration: Seconds that are encoded at once, padding counted. If not given: one recording on a CPU, where
            larger batches take longer, and on a GPU as many as `frames_at_once`.
        progress: Label of the progress bar; no bar if None.
        window_frames: Most frames of 20 ms of a window.
        num_workers: Number of processes that read audio.
        precision: Context of the encoder, such as torch.autocast.

    Returns:
        Group after group, in the order of its recordings: (frames, tokens) float32 each, on the CPU.

    Raises:
        UserError: Audio cannot be read.
    """
    device = model.head.weight.device

    def encode(waveform: Tensor, length: Tensor, statistics: WaveformStatistics | None = None) -> Tensor:
        padded = length_if_padded(length, device)
        with precision():
            log_probs: Tensor = model(waveform.to(device), padded, ignore_padding=True)
        return log_probs

    return extract_cuts(
        Extractor(
            encode,
            "letters",
            (len(model.vocabulary),),
            device,
            clock=model.clock,
            layout=WindowLayout.of(model.encoder.config),
        ),
        groups,
        progress,
        batch_duration=batch_duration,
        num_workers=num_workers,
        windows_of=partial(quiet_windows, longest=in_frames(window_frames, model.clock), clock=model.clock),
    )
