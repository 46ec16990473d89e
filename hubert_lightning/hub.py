"""Methods of models that are saved in folders and on the Hugging Face hub.

They are those of huggingface_hub's PyTorchModelHubMixin, with the folders of `hubert export`. The work is done by
`save_model` and `push_model`, which know all formats; they are imported when a method is called.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubert_lightning.errors import UserError


@dataclass(frozen=True)
class ModelParts:
    """What the folder of a model holds.

    Args:
        encoder: HubertEncoder.
        head: Linear layer of a fine-tuned model.
        vocabulary: Tokens of this layer.
        centroids: (clusters, dim) of the K-means of units, of each stage if it is residual.
        kmeans_source: Everything that the centroids depend on, by name.
    """

    encoder: Any
    head: Any = None
    vocabulary: Any = None
    centroids: Any = None
    kmeans_source: Mapping[str, str] | None = None


@dataclass(frozen=True)
class CardFacts:
    """What the author of a model states in the front matter of its card.

    Args:
        license: Identifier of the licence on the hub, such as mit or cc-by-4.0.
        language: Codes of the languages, such as en or pt.
        datasets: Names of datasets on the hub.
    """

    license: str | None = None
    language: Sequence[str] = ()
    datasets: Sequence[str] = ()


class HubModel:
    """A model with `save_pretrained` and `push_to_hub`."""

    def model_parts(self) -> ModelParts:
        """Return what the folder of the model holds."""
        raise NotImplementedError

    def save_pretrained(self, folder: Path | str, card: CardFacts = CardFacts()) -> Path:
        """Write the model to a new folder in the format of transformers, which `from_pretrained` opens, with a card.

        Args:
            folder: Folder to create.
            card: Licence, languages and datasets for the model card.

        Returns:
            The folder.

        Raises:
            UserError: The folder exists already, or the model cannot be saved.
        """
        from hubert_lightning import save_model

        return save_model(self, Path(folder), card)

    def push_to_hub(
        self, repo_id: str, private: bool = False, token: str | None = None, card: CardFacts = CardFacts()
    ) -> str:
        """Upload the folder of `save_pretrained` to the Hugging Face hub.

        Args:
            repo_id: Name on the hub, owner/name; created if it is not there.
            private: Whether a new repository is private.
            token: Token of the hub; default: that of `hf auth login` or HF_TOKEN.
            card: Licence, languages and datasets for the model card.

        Returns:
            Address of the commit.

        Raises:
            UserError: The name or the token cannot be used, or the hub does not answer.
        """
        from hubert_lightning import push_model

        return push_model(self, repo_id, private, token, card)


def no_encoder(name: str) -> UserError:
    """Return the error of a model that has no encoder to save."""
    return UserError(f"{name}: has no encoder, so there is no model to save; copy its K-means file")
