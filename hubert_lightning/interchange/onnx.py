"""Encoders and fine-tuned models as ONNX graphs, for batches of any size and length."""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hubert_lightning.errors import UserError
from hubert_lightning.frames import SAMPLE_RATE, num_frames
from hubert_lightning.model.hubert import HubertEncoder

TRIAL_LENGTHS = ((2 * SAMPLE_RATE, SAMPLE_RATE), (3 * SAMPLE_RATE + 123, 5_000, 24_000))
"""Samples of the utterances of each batch that a graph is tried on, besides one of a single frame."""
LOUD = ("torch.onnx", "torch._guards")
"""Loggers of the exporter: the second one calls its first attempt an error, after which it succeeds."""
TOLERANCE = 1e-4  # for numbers of about 1; single runs differ by a few millionths


class Exported(nn.Module):
    """The computation of a graph: features of a layer, or log-probabilities of letters.

    Args:
        encoder: Encoder.
        head: CTC head, if the output is log-probabilities.
        layer: Layer whose features are the output, counted from 1; the last one, after its norm, if not given.
    """

    def __init__(self, encoder: HubertEncoder, head: nn.Linear | None, layer: int | None) -> None:
        super().__init__()
        self.encoder, self.head, self.layer = encoder, head, layer

    def forward(self, waveform: Tensor, length: Tensor) -> Tensor:
        """Compute the output of the graph.

        Args:
            waveform: (batch, samples).
            length: (batch,) int64, samples before padding.

        Returns:
            (batch, frames, dim or tokens).
        """
        if self.layer is not None:
            return self.encoder.features(waveform, length, layer=self.layer)
        frames: Tensor = self.encoder(waveform, length, kept=[True] * len(self.encoder.layers))
        return frames if self.head is None else self.head(frames).log_softmax(dim=-1)


def write_onnx(path: Path, encoder: HubertEncoder, head: nn.Linear | None, layer: int | None, about: object) -> float:
    """Write a graph, and test it in onnxruntime.

    Its inputs are `waveform` (batch, samples) and `length` (batch,), samples before padding. Padding counts in the
    group norm of Base, as in the reference, so give utterances one by one if the model has group norm.

    Args:
        path: File to write.
        encoder: Encoder in eval mode.
        head: CTC head in eval mode; without one, the graph has the encoder's output.
        layer: Layer whose output the graph has, counted from 1; the last one, after its norm, if not given.
        about: Metadata of the file, as a JSON value.

    Returns:
        Largest difference from our own numbers.

    Raises:
        UserError: Packages are missing, or onnxruntime computes something else.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # type: ignore[import-untyped]
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; install hubert-lightning[onnx]") from error
    model, output = Exported(encoder, head, layer).eval(), "log_probabilities" if head is not None else "frames"
    example = torch.zeros(2, SAMPLE_RATE), torch.tensor([SAMPLE_RATE, SAMPLE_RATE // 2])
    batch, window = torch.export.Dim("batch", min=1), encoder.config.clock.window
    # It prints each of its steps
    with warnings.catch_warnings(), _quiet(), redirect_stdout(StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            example,
            dynamo=True,
            input_names=["waveform", "length"],
            output_names=[output],
            dynamic_shapes={"waveform": {0: batch, 1: torch.export.Dim("samples", min=window)}, "length": {0: batch}},
            verbose=False,
        )
        assert program is not None
        _forget_traces(program.model)
        program.model.metadata_props["hubert_lightning"] = json.dumps(about, ensure_ascii=False)
        program.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = max(_difference(session, model, lengths) for lengths in ((window,), *TRIAL_LENGTHS))
    if not worst <= TOLERANCE:
        raise UserError(
            f"{path}: onnxruntime {onnxruntime.__version__} computes numbers that differ by {worst:.2g} from ours; "
            "install another version of onnx, onnxscript or onnxruntime"
        )
    return worst


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in LOUD]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _forget_traces(model: Any) -> None:
    """Remove the stack traces that the exporter puts into the graph, which name files of this machine.

    Args:
        model: Model of onnx_ir, which has no types.
    """
    for graph in (*model.graphs(), *model.functions.values()):
        nodes = [*graph.all_nodes()]
        initializers = getattr(graph, "initializers", {}).values()
        outputs = [value for node in nodes for value in node.outputs]
        for part in (graph, *nodes, *graph.inputs, *initializers, *outputs):
            part.metadata_props.clear()
            part.doc_string = None
    model.metadata_props.clear()
    model.doc_string = None


@torch.no_grad()
def _difference(session: Any, model: Exported, lengths: tuple[int, ...]) -> float:
    generator = torch.Generator().manual_seed(0)
    waveform, length = torch.randn(len(lengths), max(lengths), generator=generator), torch.tensor(lengths)
    [output] = session.run(None, {"waveform": waveform.numpy(), "length": length.numpy()})
    frames = num_frames(length, model.encoder.config.clock).tolist()
    pairs = zip(torch.from_numpy(output), model(waveform, length), frames, strict=True)
    return max(float((theirs[:count] - ours[:count]).abs().max()) for theirs, ours, count in pairs)
