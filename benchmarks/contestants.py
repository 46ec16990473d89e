"""The models that train_step.py and roofline.py compare: ours, torchaudio's, transformers' and minimal-hubert's."""

import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchaudio
import transformers
from lightning import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torchaudio.models.wav2vec2.components import LogitGenerator

from hubert_lightning.model.compilation import compile_methods
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.prediction import ClusterPredictor
from hubert_lightning.pretrained.dialect import to_ours
from hubert_lightning.pretrained.formats.transformers import DIALECT, SETTINGS
from hubert_lightning.training.batches import PretrainingBatch
from hubert_lightning.training.pretraining import HubertPretraining

COMPILED = ", compiled"
"""End of the name of a contestant that takes part compiled, besides as it is."""
OURS = ("ours", f"ours{COMPILED}")
MAX_NORM = 10.0
"""Norm to which whole steps clip gradients, as in fairseq."""
HEAD = {"logit_generator.label_embeddings": "predictors.0.codewords"}
HEAD |= {"logit_generator.final_proj.": "predictors.0.projection."}


class Size(NamedTuple):
    name: str  # base, large or xlarge
    config: EncoderConfig
    final_dim: int
    clusters: int


class Contestant(NamedTuple):
    """A model and its training step.

    Args:
        model: Model with its head.
        loss: Mean loss of a batch.
        names: Parts of its parameters' names, and what transformers or we call them.
        penalty: Weight of the mean square of the convolutions' output; None for the number of masked frames.
        compile: Compiles it as its authors do; None if they do not.
        add: In a whole step, turns the loss of a batch into what the backward pass starts from.
        finish: In a whole step, prepares the gradients for the optimizer; by default, torch clips them.
    """

    model: nn.Module
    loss: Callable[[PretrainingBatch], Tensor]
    names: dict[str, str] = {}  # noqa: RUF012
    penalty: float | None = 10.0
    compile: Callable[[], None] | None = None
    add: Callable[[Tensor, PretrainingBatch], Tensor] = lambda loss, batch: loss
    finish: Callable[[Optimizer], object] | None = None


def ours(size: Size) -> Contestant:
    """The task of `hubert fit` with its GlobalBatch: gradients of sums, scaled, clipped and tested for skipping."""
    model = HubertPretraining(size.config, size.clusters, size.final_dim)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # GlobalBatch reads the number of ranks and of accumulated batches from it
    model.trainer = trainer = Trainer(
        devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )

    def add(loss: Tensor, batch: PretrainingBatch) -> Tensor:
        return model.global_batch.add(loss, model._num_terms(batch), batch.id)

    def finish(optimizer: Optimizer) -> None:
        assert trainer.world_size == 1
        model.global_batch.finish(model, optimizer, MAX_NORM, "norm")

    def compile_model() -> None:
        model.encoder.compile_parts()
        compile_methods(*model.heads)

    def loss(batch: PretrainingBatch) -> Tensor:
        return model._step(batch, every_frame=False)[0]  # training_step without what it logs

    return Contestant(model, loss, compile=compile_model, add=add, finish=finish)


def of_torchaudio(size: Size) -> Contestant:
    model = getattr(torchaudio.models, f"hubert_pretrain_{size.name}")(encoder_layer_drop=0.0)
    model.mask_generator = hiding = GivenMask(model.mask_generator.mask_embedding)
    model.logit_generator = LogitGenerator(size.config.dim, size.clusters, size.final_dim, False, False)

    def loss(batch: PretrainingBatch) -> Tensor:
        hiding.mask = batch.mask
        masked, unmasked, penalty = model(batch.waveform, batch.cluster[:, 0])
        first = [torch.zeros(len(logits), dtype=torch.long, device=logits.device) for logits in (masked, unmasked)]
        # Its examples/hubert: sums, weighted by 1 and 0, of which the gradient is divided by the masked frames
        prediction = F.cross_entropy(masked, first[0], reduction="sum")
        prediction = prediction + 0.0 * F.cross_entropy(unmasked, first[1], reduction="sum")
        return (prediction + 10 * len(masked) * penalty) / len(masked)

    names = {"wav2vec2.": "", "encoder.feature_projection.": "feature_projection.", ".transformer.": "."}
    return Contestant(model, loss, names | {"mask_generator.mask_embedding": "masked_spec_embed"} | HEAD)


class GivenMask(nn.Module):
    """In the place of torchaudio's mask generator: the same, but for drawing the mask."""

    def __init__(self, mask_embedding: nn.Parameter) -> None:
        super().__init__()
        self.mask_embedding, self.mask = mask_embedding, torch.empty(0)

    def forward(self, x: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        x[self.mask] = self.mask_embedding.to(x.dtype)
        return x, self.mask


def of_transformers(size: Size) -> Contestant:
    """It has no recipe for pre-training: our dropout and head, and our loss at masked frames only."""
    settings = {theirs: getattr(size.config, ours) for ours, theirs in SETTINGS.items()}
    settings |= {"feat_extract_norm": size.config.conv_norm, "conv_dim": (size.config.conv_channels,) * 7}
    encoder = transformers.HubertModel(transformers.HubertConfig(**settings))
    predictor = ClusterPredictor(size.config.dim, size.clusters, size.final_dim)
    local: list[Tensor] = []
    encoder.feature_extractor.register_forward_hook(lambda module, inputs, output: local.append(output))

    def loss(batch: PretrainingBatch) -> Tensor:
        frames = encoder(batch.waveform, mask_time_indices=batch.mask).last_hidden_state
        prediction = F.cross_entropy(predictor(frames[batch.mask]), batch.cluster[:, 0][batch.mask])
        return prediction + 10 * local.pop().float().square().mean()

    model = nn.ModuleDict({"hubert": encoder, "predictors": nn.ModuleList([predictor])})
    return Contestant(model, loss, {"hubert.": ""})


def of_minimal_hubert(size: Size) -> Contestant:
    from minimal_hubert import HuBERTPretrain

    model = HuBERTPretrain(size.clusters, size.name)
    model.encoder.layer_drop = 0.0

    def loss(batch: PretrainingBatch) -> Tensor:
        losses, _ = model(batch.waveform, batch.cluster[:, 0], mask=batch.mask, attention_mask=None)
        return losses.sum() / batch.mask.sum()  # its train.py; every frame's loss has the penalty of all frames in it

    names = {"feature_projection.0.": "feature_projection.", ".convs.0.": ".conv."}
    names |= {".attention.qkv.": ".query_key_value.", ".attention.proj.": ".attention_output."}
    names |= {"mask_embedding": "masked_spec_embed"} | HEAD
    return Contestant(model, loss, names, penalty=None, compile=partial(model.compile, dynamic=True))


CONTESTANTS = ["ours", "torchaudio", "transformers", "minimal-hubert"]
COMPILABLE = ("ours", "minimal-hubert")
BUILD = {"ours": ours, "torchaudio": of_torchaudio, "transformers": of_transformers}
BUILD |= {"minimal-hubert": of_minimal_hubert}


@torch.no_grad()
def check_loss(mine: Contestant, name: str, peer: Contestant, batch: PretrainingBatch) -> None:
    state = {}
    for parameter, value in peer.model.named_parameters():
        for theirs, renamed in peer.names.items():
            parameter = parameter.replace(theirs, renamed)
        state[parameter] = value
    state = {
        name if name.startswith("predictors.") else f"encoder.{name.removeprefix('encoder.')}": value
        for name, value in to_ours(state, DIALECT).items()
    }
    mine.model.load_state_dict(state)
    mine.model.feature_penalty = float(batch.mask.sum()) if peer.penalty is None else peer.penalty
    mine.model.eval(), peer.model.eval()
    with torch.backends.cudnn.flags(allow_tf32=False):  # a GPU's convolutions would round to 10 bits
        expected, found = float(peer.loss(batch)), float(mine.loss(batch))
    differ = abs(found - expected) > 1e-4 * abs(expected)
    print(f"{name}: loss {expected:.5f}, ours with its weights {found:.5f}" + "; THEY DIFFER" * differ, flush=True)
    mine.model.train(), peer.model.train()
    mine.model.feature_penalty = mine.penalty
