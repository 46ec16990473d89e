"""How likely a neural language model finds a text: any causal model that transformers saved."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hubert_lightning.errors import UserError
from hubert_lightning.files import check_regular

LARGEST = 2**31
"""No number of a configuration is larger: sizes, and what rotary positions turn by."""


class CausalLM:
    """A directory of a causal language model and its tokenizer, as `save_pretrained` of transformers wrote it.

    Raises:
        UserError: It is not there, or no such model, or transformers is not installed.
    """

    def __init__(self, path: str | Path, batch_size: int = 32, device: torch.device | None = None) -> None:
        try:
            from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise UserError(
                f"rescorer {path}: transformers is not installed; install hubert-lightning[rescoring]"
            ) from error
        self.path = str(path)
        if not Path(path).is_dir():
            raise UserError(f"rescorer {path}: no such directory; save the model and its tokenizer with transformers")
        _check_weights(Path(path))
        # Neither code of the directory nor anything that is not in it, whatever its settings ask for
        here: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            config = AutoConfig.from_pretrained(path, **here)
            _check_size(Path(path), config)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path, config=config, **here)
            here |= {"config": config, "use_safetensors": True, "output_loading_info": True}
            self.tokenizer("a", add_special_tokens=False)
            self.model, about = cast(Any, AutoModelForCausalLM.from_pretrained(path, **here))
        except Exception as error:  # transformers fails in as many ways as there are damaged files
            raise UserError(
                f"rescorer {path}: no causal language model ({_reason(error)}); save the model and its tokenizer there "
                "with transformers"
            ) from error
        if absent := sorted(about["missing_keys"]):
            raise UserError(
                f"rescorer {path}: {len(absent)} of its weights are missing, such as {absent[0]}; save the model again"
            )
        if damaged := [name for name, value in self.model.named_parameters() if not value.isfinite().all()]:
            raise UserError(
                f"rescorer {path}: {damaged[0]} has values that are no finite numbers; save the model again"
            )
        tokens, rows = max(self.tokenizer.get_vocab().values(), default=0), self.model.get_input_embeddings().weight
        if tokens >= len(rows):
            raise UserError(
                f"rescorer {path}: a tokenizer of {tokens + 1} tokens, and a model of {len(rows)}; save one model's"
            )
        self.model.eval()
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"rescorer {path}: its tokenizer has no end of sentence (eos_token); give it one, save it")
        self.model.to(device or "cpu")
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[float]:
        """Natural logarithm of the probability of each text, with its end."""
        end = self.tokenizer.eos_token_id
        start = end if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id
        tokens = [
            torch.tensor([start, *self.tokenizer(text, add_special_tokens=False)["input_ids"], end]) for text in texts
        ]
        scores = torch.zeros(len(texts))
        order = sorted(range(len(texts)), key=lambda place: len(tokens[place]))
        for first in range(0, len(order), self.batch_size):
            places = order[first : first + self.batch_size]
            scores[places] = self._score([tokens[place] for place in places])
        return scores.tolist()

    def _score(self, tokens: Sequence[Tensor]) -> Tensor:
        length = torch.tensor([len(of) for of in tokens])
        batch = pad_sequence(list(tokens), batch_first=True).to(self.model.device)  # (batch, tokens)
        there = (torch.arange(batch.shape[1]) < length[:, None]).to(batch.device)
        logits = self.model(input_ids=batch, attention_mask=there.long()).logits[:, :-1].float()
        log_probs = logits.log_softmax(dim=-1).gather(2, batch[:, 1:, None])[..., 0]
        return (log_probs * there[:, 1:]).sum(dim=1).cpu()


def _check_weights(folder: Path) -> None:
    """Refuse weights in a pickle, which transformers would open by itself, and what is no file."""
    for path in folder.iterdir():
        if not path.is_dir():
            check_regular(path)
    if not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin")):
        raise UserError(
            f"rescorer {folder}: its weights are a pickle, which may hold code; open the model where you trust it, and "
            "save_pretrained() it as safetensors"
        )


def _check_size(folder: Path, config: Any) -> None:
    """Refuse settings of a model that is larger than its weights, before it is built.

    Raises:
        UserError: The settings ask for more layers than there are tensors, or for a size that no memory holds.
        SafetensorError: A file of weights is damaged.
    """
    tensors = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            tensors += len(weights.keys())
    for part in (config, config.get_text_config()):
        layers = getattr(part, "num_hidden_layers", 0)
        if isinstance(layers, int) and layers > tensors:
            raise UserError(f"its settings ask for {layers} layers, and it has {tensors} tensors")
        sizes = {name: value for name, value in part.to_dict().items() if isinstance(value, int)}
        if wrong := [name for name, value in sizes.items() if abs(value) > LARGEST]:
            raise UserError(f"its settings set {wrong[0]} to {sizes[wrong[0]]}, which no memory holds")


def _reason(error: Exception) -> str:
    """The first line of what a library says, or the kind of its error."""
    said = str(error).strip()
    if "custom code" in said or "trust_remote_code" in said:
        return "it needs code of its own, which is not run; give a model of a kind that transformers knows"
    return f"{type(error).__name__}: {said.splitlines()[0][:200]}" if said else type(error).__name__
