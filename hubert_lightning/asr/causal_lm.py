"""Log-probabilities of texts by a neural language model: any causal model that transformers saved."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hubert_lightning.errors import UserError
from hubert_lightning.files import check_regular

MAX_SETTING = 2**31
"""No integer of a real configuration is larger, neither sizes nor the base of rotary positions."""


class CausalLM:
    """A causal language model with its tokenizer.

    Args:
        path: Directory that `save_pretrained` of transformers wrote.
        batch_size: Number of texts that are scored at once.
        device: Device of the model; the CPU if not given.

    Raises:
        UserError: The directory does not exist or holds no such model, or transformers is not installed.
    """

    def __init__(self, path: str | Path, batch_size: int = 32, device: torch.device | None = None) -> None:
        self.path = str(path)
        self.batch_size = batch_size
        self.tokenizer, self.model, missing = _load(Path(path))
        if missing:
            raise UserError(
                f"rescorer {path}: {len(missing)} of its weights are missing, such as {missing[0]}; save the model "
                "again"
            )
        if not_finite := [name for name, value in self.model.named_parameters() if not value.isfinite().all()]:
            raise UserError(f"rescorer {path}: {not_finite[0]} has values that are not finite; save the model again")
        num_tokens = max(self.tokenizer.get_vocab().values(), default=0) + 1
        num_rows = len(self.model.get_input_embeddings().weight)
        if num_tokens > num_rows:
            raise UserError(
                f"rescorer {path}: its tokenizer has {num_tokens} tokens, its model {num_rows}; save a matching pair"
            )
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"rescorer {path}: its tokenizer has no end of sentence (eos_token); set it and save")
        self.model.eval().to(device or "cpu")

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[float]:
        """Compute the natural logarithm of the probability of each text, with its end."""
        end = self.tokenizer.eos_token_id
        start = end if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id
        tokens = [
            torch.tensor([start, *self.tokenizer(text, add_special_tokens=False)["input_ids"], end]) for text in texts
        ]
        scores = torch.zeros(len(texts))
        by_length = sorted(range(len(texts)), key=lambda index: len(tokens[index]))
        for first in range(0, len(by_length), self.batch_size):
            batch = by_length[first : first + self.batch_size]
            scores[batch] = self._score([tokens[index] for index in batch])
        return [float(score) for score in scores]

    def _score(self, tokens: Sequence[Tensor]) -> Tensor:
        length = torch.tensor([len(row) for row in tokens])
        batch = pad_sequence(list(tokens), batch_first=True).to(self.model.device)  # (batch, tokens)
        is_token = (torch.arange(batch.shape[1]) < length[:, None]).to(batch.device)
        logits: Tensor = self.model(input_ids=batch, attention_mask=is_token.long()).logits[:, :-1].float()
        log_probs = logits.log_softmax(dim=-1).gather(2, batch[:, 1:, None])[..., 0]
        return (log_probs * is_token[:, 1:]).sum(dim=1).cpu()


def _load(path: Path) -> tuple[Any, Any, list[str]]:  # Any: transformers is not typed
    """Load tokenizer and model, and the names of weights that the files lack."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise UserError(
            f"rescorer {path}: transformers is not installed; install hubert-lightning[rescoring]"
        ) from error
    if not path.is_dir():
        raise UserError(f"rescorer {path}: no such directory; save the model and its tokenizer with transformers")
    _check_weights(path)
    # Neither code of the directory nor downloads, whatever its settings ask for
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(path, **local)
        _check_size(path, config)
        tokenizer: Any = AutoTokenizer.from_pretrained(path, config=config, **local)
        tokenizer("a", add_special_tokens=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, config=config, use_safetensors=True, output_loading_info=True, **local
        )
    except Exception as error:  # transformers raises errors of many types for corrupt files
        raise UserError(
            f"rescorer {path}: no causal language model ({_reason(error)}); save the model and its tokenizer there "
            "with transformers"
        ) from error
    model, info = loaded
    return tokenizer, model, sorted(info["missing_keys"])


def _check_weights(folder: Path) -> None:
    """Refuse pickled weights, which transformers would open, and anything that is not a file."""
    for path in folder.iterdir():
        if not path.is_dir():
            check_regular(path)
    if not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin")):
        raise UserError(
            f"rescorer {folder}: its weights are a pickle, which may hold code; open the model where you trust it, and "
            "save_pretrained() it as safetensors"
        )


def _check_size(folder: Path, config: Any) -> None:
    """Refuse settings of a larger model than its weights, before the model is built.

    Raises:
        UserError: The settings have more layers than there are tensors, or an integer that no memory holds.
        SafetensorError: A file of weights is corrupt.
    """
    num_tensors = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            num_tensors += len(weights.keys())
    for settings in (config, config.get_text_config()):
        num_layers = getattr(settings, "num_hidden_layers", 0)
        if isinstance(num_layers, int) and num_layers > num_tensors:
            raise UserError(f"its settings have {num_layers} layers, its weights {num_tensors} tensors")
        integers = {name: value for name, value in settings.to_dict().items() if isinstance(value, int)}
        if too_large := [name for name, value in integers.items() if abs(value) > MAX_SETTING]:
            raise UserError(f"its settings set {too_large[0]} to {integers[too_large[0]]}, which is too large")


def _reason(error: Exception) -> str:
    """First line of a library's message, or the type of its error."""
    message = str(error).strip()
    if "custom code" in message or "trust_remote_code" in message:
        return "it needs code of its own, which is not run; give a model of an architecture that transformers has"
    return f"{type(error).__name__}: {message.splitlines()[0][:200]}" if message else type(error).__name__
