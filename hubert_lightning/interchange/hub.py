"""Models in folders and on the Hugging Face hub: `save_pretrained`, `push_to_hub` and `hubert export --push`."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from hubert_lightning.errors import UserError
from hubert_lightning.files import new_folder
from hubert_lightning.hub import CardFacts, HubModel, ModelParts
from hubert_lightning.interchange.model_card import model_card
from hubert_lightning.interchange.run_facts import Facts, public_provenance
from hubert_lightning.pretrained.formats import FORMATS
from hubert_lightning.pretrained.formats.own import to_safetensors
from hubert_lightning.pretrained.load import COMPANION_FILE, KMEANS_FILE, encoder_fingerprint
from hubert_lightning.pretrained.weights import PretrainedWeights
from hubert_lightning.units.kmeans_file import kmeans_fingerprint, save_kmeans

FORMAT: Final = "transformers"
"""Format of folders for the hub, which other packages open too."""
LATER = "the folder is written, so `hf upload {name} {folder} .` sends it later"


def save_model(model: HubModel, folder: Path | str, card: CardFacts = CardFacts(), name: str | None = None) -> Path:
    """Write a model to a new folder in the format of transformers, with its K-means and a card.

    Args:
        model: Encoder, units or transcriber.
        folder: Folder to create.
        card: Licence, languages and datasets for the model card.
        name: Name of the model in its card; that of the folder if not given.

    Returns:
        The folder.

    Raises:
        UserError: The folder exists already, or the model cannot be saved.
    """
    folder, parts = Path(folder), model.model_parts()
    if folder.exists():
        raise UserError(f"{folder}: exists already; remove it or choose another folder")
    with new_folder(folder) as new:
        _write(parts, new, name or folder.name, card)
    return folder


def push_model(
    model: HubModel, repo_id: str, private: bool = False, token: str | None = None, card: CardFacts = CardFacts()
) -> str:
    """Upload the folder of `save_model` to the Hugging Face hub.

    Args:
        model: Encoder, units or transcriber.
        repo_id: Name on the hub, owner/name; created if it is not there.
        private: Whether a new repository is private.
        token: Token of the hub; default: that of `hf auth login` or HF_TOKEN.
        card: Licence, languages and datasets for the model card.

    Returns:
        Address of the commit.

    Raises:
        UserError: As in `save_model`; or the name or the token cannot be used, or the hub does not answer.
    """
    check_push(repo_id, token)
    with TemporaryDirectory() as temporary:
        folder = save_model(model, Path(temporary) / "model", card, repo_id)
        return push_folder(folder, repo_id, private, token, "")


def _write(parts: ModelParts, folder: Path, name: str, card: CardFacts) -> None:
    fingerprint = encoder_fingerprint(parts.encoder)
    state = {key: value.detach().float().cpu() for key, value in parts.encoder.state_dict().items()}
    weights = PretrainedWeights(parts.encoder.config, state, provenance={"encoder": fingerprint})
    if parts.head is not None:
        head = {key: value.detach().float().cpu() for key, value in parts.head.state_dict().items()}
        weights = PretrainedWeights(
            parts.encoder.config, state, head=head, vocabulary=parts.vocabulary, provenance={"encoder": fingerprint}
        )
    files, rest = FORMATS[FORMAT].write(weights)
    files |= {} if rest is None else {COMPANION_FILE: to_safetensors(rest)}
    for file, content in files.items():
        (folder / file).write_bytes(content)
    if parts.centroids is not None:
        source = public_provenance(parts.kmeans_source or {})
        save_kmeans(folder / KMEANS_FILE, parts.centroids, source | {"kmeans": kmeans_fingerprint(parts.centroids)})
    (folder / "README.md").write_text(model_card(name, weights, parts.encoder, Facts(), FORMAT, card), "utf-8")


def check_push(repo_id: str, token: str | None = None) -> None:
    """Check, without the network, that a name can be one on the hub, and that there is a token.

    Raises:
        UserError: The name cannot be one, or there is no token.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{repo_id!r} cannot be a name on the hub ({_first_line(error)}); give owner/name") from error
    if "/" not in repo_id:
        raise UserError(f"{repo_id!r} has no owner; give owner/name, such as my-group/hubert-base")
    if not token and not get_token():
        raise UserError(
            f"{repo_id}: no token of the Hugging Face hub on this machine; run `hf auth login`, or set HF_TOKEN"
        )


def push_folder(folder: Path, repo_id: str, private: bool = False, token: str | None = None, later: str = LATER) -> str:
    """Upload a folder to the hub, to a repository that is created if it is not there.

    Args:
        folder: Folder of a model, with its card.
        repo_id: Name on the hub.
        private: Whether a new repository is private.
        token: Token of the hub; default: that of this machine.
        later: End of the sentences about failures, with {name} and {folder}.

    Returns:
        Address of the commit.

    Raises:
        UserError: The hub refuses the token or the name, or does not answer.
    """
    from huggingface_hub import HfApi

    check_push(repo_id, token)
    api = HfApi(token=token, library_name="hubert_lightning")
    with _sentences(repo_id, api.endpoint, later.format(name=repo_id, folder=folder)):
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message="Upload a HuBERT model of hubert_lightning"
        )
    return str(commit.commit_url)


@contextmanager
def _sentences(repo_id: str, endpoint: str, later: str) -> Iterator[None]:
    """Raise failures of an upload as sentences."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]  # that of its httpx

    end = f"; {later}" if later else ""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        reasons = {
            401: "the hub refuses the token; run `hf auth login` again",
            403: "the token may not write there; use one with the right to write, or a name of your own",
            404: "the hub has no such owner; correct the name",
            409: "the hub has another kind of repository of this name; choose another",
        }
        reason = reasons.get(status) or f"the hub answers: {_first_line(error)}"
        raise UserError(f"{repo_id}: not uploaded, {reason}{end}") from error
    except (HTTPError, OSError) as error:
        reason = f"{endpoint} does not answer ({_first_line(error)})"
        raise UserError(f"{repo_id}: not uploaded, {reason}; check the network{end}") from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"\s*\(Request ID:[^)]*\)", "", lines[0])[:200] if lines else type(error).__name__
