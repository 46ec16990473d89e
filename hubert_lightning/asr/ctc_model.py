"""A fine-tuned model as a function: audio in, log-probabilities of letters out. It needs no Lightning."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from lhotse.cut import Cut
from torch import Tensor, nn

from hubert_lightning.errors import UserError
from hubert_lightning.features.extract import extract_cuts
from hubert_lightning.features.extractors import Extractor, length_if_padded
from hubert_lightning.features.windows import quiet_windows
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.pretrained.load import encoder_fingerprint, head_of, no_letters, read_trained
from hubert_lightning.pretrained.weights import encoder_of, linear_of
from hubert_lightning.vocabulary import Vocabulary, vocabulary_from

LONGEST = 1_500
"""Frames, 30 s, that are encoded at once: models heard nothing longer in training, and memory stays small."""


class CTCModel(nn.Module):
    """An encoder, its linear layer, and the letters that it spells with."""

    def __init__(self, encoder: HubertEncoder, head: nn.Linear, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.encoder, self.head, self.vocabulary = encoder, head, vocabulary

    def forward(self, waveform: Tensor, length: Tensor | None = None, *, ignore_padding: bool = False) -> Tensor:
        """Log-probabilities of the letters.

        waveform: (batch, samples), 16 kHz
        length:   (batch,), samples before padding; none if nothing is padded
        ignore_padding: keep padding out of the group norm of Base, where it counts in the reference
        returns:  (batch, frames, tokens) float32
        """
        return self.head(self.encoder(waveform, length, ignore_padding=ignore_padding)).float().log_softmax(dim=-1)

    def fingerprint(self) -> str:
        """A short name that models share only if they compute the same log-probabilities of the same letters."""
        digest = hashlib.sha256(encoder_fingerprint(self.encoder).encode())
        digest.update(json.dumps(self.vocabulary.settings(), sort_keys=True).encode())
        for name, value in sorted(self.head.state_dict().items()):
            digest.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def load_ctc(path: Path | str) -> CTCModel:
    """A fine-tuned model in eval mode, on the CPU; the blank is its first token.

    path: whatever `model.pretrained.read_trained` opens, with a layer that spells

    Raises:
        UserError: It is damaged, not fine-tuned, or does not say what letters it spells with.
    """
    path, trained = Path(path), read_trained(path)
    encoder, head = encoder_of(trained, path), linear_of(head_of(trained, path), path)
    if trained.vocabulary is None:
        raise UserError(no_letters(path, len(head.weight)))
    vocabulary = vocabulary_from(trained.vocabulary, path)
    if len(vocabulary) != len(head.weight):
        raise UserError(
            f"{path} has a head for {len(head.weight)} tokens, and its vocabulary has {len(vocabulary)}; one of them "
            "is another model's"
        )
    return CTCModel(encoder, head, vocabulary).eval()


def log_probabilities(
    model: CTCModel,
    groups: Sequence[Sequence[Cut]],
    *,
    batch_duration: float | None = None,
    what: str,
    longest: int = LONGEST,
    num_workers: int = 0,
    precision: Callable[[], AbstractContextManager] = nullcontext,
) -> Iterator[list[Tensor]]:
    """Those of each cut of each group, whatever its length: long ones are encoded in windows that are cut in pauses
    and hear a little beyond them, so that nothing is lost or doubled.

    batch_duration: seconds that are encoded at once, padding counted; if not given, one recording at a time on a CPU,
        where more together take longer, and four minutes on a GPU
    what:           the name of the progress bar
    longest:        frames of a recording that are encoded at once
    returns:        group after group, in the order of its cuts: (frames, tokens) float32, on the CPU

    Raises:
        UserError: Audio that cannot be read.
    """
    device = model.head.weight.device

    def spell(waveform: Tensor, length: Tensor) -> Tensor:
        padded = length_if_padded(length, device)
        with precision():
            return model(waveform.to(device), padded, ignore_padding=True).cpu()

    return extract_cuts(
        Extractor(spell, "letters", (len(model.vocabulary),), device),
        groups,
        what,
        batch_duration=batch_duration,
        num_workers=num_workers,
        windows_of=partial(quiet_windows, longest=longest),
    )
