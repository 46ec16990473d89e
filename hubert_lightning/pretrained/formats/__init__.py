"""Checkpoint formats: the files of this package, and those of other systems.

A new format is a module with the functions of `Format`, and one line in `FORMATS`, with its name in `FormatName`.
"""

from collections.abc import Mapping
from typing import Literal, Protocol

from hubert_lightning.pretrained.checkpoint_source import CheckpointSource
from hubert_lightning.pretrained.formats import fairseq, own, torchaudio, transformers
from hubert_lightning.pretrained.weights import Export, PretrainedWeights


class Format(Protocol):
    """The functions of a format's module."""

    def has_names(self, state: Mapping[str, object]) -> bool:
        """Tell whether a state dict has the names of this system, also inside a larger module."""

    def matches(self, source: CheckpointSource) -> bool:
        """Tell whether a file or folder is of this format."""

    def read(self, source: CheckpointSource, num_heads: int | None = None) -> PretrainedWeights:
        """Read the weights of a file or folder that matches.

        Args:
            source: File or folder.
            num_heads: Attention heads, for a file that does not state them.

        Raises:
            UserError: The file is corrupt, or holds another model than a HuBERT.
        """

    def write(self, weights: PretrainedWeights) -> Export:
        """Write the files of a folder.

        Raises:
            UserError: The system has no such model.
        """


FormatName = Literal["safetensors", "torchaudio", "fairseq", "transformers"]
FORMATS: dict[FormatName, Format] = {
    "safetensors": own,
    "torchaudio": torchaudio,
    "fairseq": fairseq,
    "transformers": transformers,  # after torchaudio, whose names end like those of transformers
}
"""Name → module. They are asked in this order."""
