"""How likely a neural language model finds a text: any causal model that transformers saved."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class CausalLM:
    """A directory of a causal language model and its tokenizer, as `save_pretrained` of transformers wrote it.

    Raises:
        ValueError: It is not there, or no such model, or transformers is not installed.
    """

    def __init__(self, path: str | Path, batch_size: int = 32, device: torch.device | None = None) -> None:
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise ValueError(
                f"rescorer {path}: transformers is not installed; install hubert-lightning[rescoring]"
            ) from error
        self.path = str(path)
        if not Path(path).is_dir():
            raise ValueError(f"rescorer {path}: no such directory; save the model and its tokenizer with transformers")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
            self.model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True).eval()
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"rescorer {path}: no causal language model ({str(error).splitlines()[0]}); save the model and its "
                "tokenizer there with transformers"
            ) from error
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"rescorer {path}: its tokenizer has no end of sentence (eos_token); give it one, save it")
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
