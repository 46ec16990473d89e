"""Copies to and from a GPU that overlap with its computation, so that the host waits once for a batch.

A batch is copied while the batch before it is computed. A result is copied to page-locked memory, and given once the
next batch is being computed.
"""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from hubert_lightning.errors import UserError
from hubert_lightning.features.loading import LoadedBatch
from hubert_lightning.model.convolutions import WaveformStatistics

About = TypeVar("About")


def copied_ahead(batches: Iterable[LoadedBatch | UserError], device: torch.device) -> Iterator[LoadedBatch | UserError]:
    """Copy batches to a device, on a GPU one batch ahead of the computation; lengths stay on the host.

    Args:
        batches: Batches, in page-locked memory if the device is a GPU; or errors, which keep their places.
        device: Device that computes.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch if isinstance(batch, UserError) else _copied(batch, device)
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call, unused-ignore]
    ahead: tuple[LoadedBatch | UserError, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            copy = batch if isinstance(batch, UserError) else _copied(batch, device)
            event = stream.record_event()
        if ahead is not None:
            yield _usable(*ahead, device)
        ahead = copy, event
    if ahead is not None:
        yield _usable(*ahead, device)


def given_later(
    results: Iterable[tuple[About, Tensor]], device: torch.device, to_host: bool = True
) -> Iterator[tuple[About, Tensor]]:
    """Give results of a GPU once the next one is being computed, so that the GPU never waits for the host.

    Args:
        results: What each result is of, and the result.
        device: Device that computes.
        to_host: Whether results are copied to the host, all rows at once; otherwise they stay on the GPU.

    Raises:
        UserError: That of `results`, after all results before it.
    """
    if device.type != "cuda":
        for about, result in results:
            yield about, result.cpu() if to_host else result
        return
    held: tuple[About, Tensor, torch.cuda.Event] | None = None
    try:
        for about, result in results:
            copy = result.to("cpu", non_blocking=True) if to_host else result  # page-locked memory
            # While the host waits, it sleeps
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call, unused-ignore]
            event.record(torch.cuda.current_stream(device))
            before, held = held, (about, copy, event)
            if before is not None:
                yield _finished(*before)
    except UserError:
        if held is not None:
            yield _finished(*held)
        raise
    if held is not None:
        yield _finished(*held)


def _copied(batch: LoadedBatch, device: torch.device) -> LoadedBatch:
    statistics = batch.statistics
    if statistics is not None:
        exact = torch.float32 if device.type == "mps" else torch.float64  # for differences of large numbers
        statistics = WaveformStatistics(*(value.to(device, exact, non_blocking=True) for value in statistics))
    kept = None if batch.kept is None else batch.kept.to(device, non_blocking=True)
    return batch._replace(rows=batch.rows.to(device, non_blocking=True), statistics=statistics, kept=kept)


def _usable(batch: LoadedBatch | UserError, copied: torch.cuda.Event, device: torch.device) -> LoadedBatch | UserError:
    """Let the computation wait for the copy, and the memory for the computation."""
    stream = torch.cuda.current_stream(device)
    stream.wait_event(copied)
    if not isinstance(batch, UserError):
        for tensor in (batch.rows, batch.kept, *(batch.statistics or ())):
            if tensor is not None:
                tensor.record_stream(stream)
    return batch


def _finished(about: About, result: Tensor, event: torch.cuda.Event) -> tuple[About, Tensor]:
    event.synchronize()
    return about, result
