"""A compiled encoder, in how many graphs."""

import pytest
import torch
from torch._dynamo.utils import counters

from hubert_lightning.frames import num_frames
from hubert_lightning.model import compilation
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.model.positions import convolved_blocks, in_blocks
from hubert_lightning.model.prediction import ClusterPredictor

DROPOUT = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1, "input_dropout": 0.1, "layer_drop": 0.5}
SIZE = {"conv_channels": 8, "dim": 16, "num_layers": 3, "num_heads": 2, "ffn_dim": 32, "pos_kernel": 8, "pos_groups": 4}
LARGE = {"conv_norm": "layer", "pre_norm": True, "normalize_waveform": True}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{}, LARGE, {"position_buckets": 16}, {"pos_batch_norm": True}])
def test_each_method_has_one_graph_whatever_the_rows_frames_and_skipped_layers(
    kind: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")  # traces as inductor does, and compiles at once
    encoder = HubertEncoder(EncoderConfig(**SIZE | DROPOUT | kind))  # type: ignore[arg-type]
    head = ClusterPredictor(16, 10)
    encoder.compile_parts()
    compilation.compile_methods(head)

    def step(rows: int, samples: int, kept: tuple[bool, ...] = (True, True, True)) -> None:
        mask = torch.rand(rows, num_frames(samples)) < 0.5
        head(encoder(torch.randn(rows, samples), mask=mask, kept=kept)).square().mean().backward()

    @torch.no_grad()
    def evaluate(rows: int, samples: int) -> None:
        encoder.eval()
        length = torch.tensor([samples, *[samples - 700] * (rows - 1)])
        head(encoder(torch.randn(rows, samples), length))
        encoder.train()

    torch._dynamo.reset()  # graphs of other tests
    counters.clear()
    step(3, 4000)
    most = 4  # before and after the positional convolution, a layer, the head
    most += 2 * ("conv_norm" in kind)  # norms of Large
    assert counters["stats"]["unique_graphs"] <= most
    with torch._dynamo.config.patch(error_on_recompile=True):
        step(3, 5000)
        step(5, 4200, kept=(False, True, True))
        step(2, 8000, kept=(True, False, False))
    step(1, 4000)
    evaluate(3, 4000)
    with torch._dynamo.config.patch(error_on_recompile=True):
        step(1, 5000)
        step(4, 3000)
        evaluate(2, 5000)


@pytest.mark.slow
def test_the_products_of_the_positional_convolution_have_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    weight, bias = torch.randn(16, 8, 32, requires_grad=True), torch.randn(16, requires_grad=True)

    def step(rows: int, frames: int) -> None:
        blocks = in_blocks(torch.randn(rows, frames, 16, requires_grad=True))
        compilation.call_compiled(convolved_blocks, ((0, 1), (), ()), blocks, weight, bias).sum().backward()

    torch._dynamo.reset()
    counters.clear()
    step(2, 50)
    assert counters["stats"]["unique_graphs"] == 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        step(3, 64)
        step(5, 33)
