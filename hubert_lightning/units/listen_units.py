"""Units of live audio on standard input."""

import json
from time import perf_counter

import torch
from torch import Tensor

from hubert_lightning.errors import UserError
from hubert_lightning.features.stream import FrameStream, print_latency, seconds_for_a_step, seconds_of, standard_input


def listen_units(stream: FrameStream) -> None:
    """Print a JSON line for every step of standard input as soon as its units are known, and the latency."""
    durations = [seconds_for_a_step(stream) for _ in range(3)][1:]  # the first one warms up
    print_latency("units come", stream, durations)
    durations.clear()
    num_units, num_samples = 0, 0

    def print_units(units: Tensor) -> None:
        nonlocal num_units
        for step in torch.split(units, stream.step):
            if len(step):
                start, end = num_units, num_units + len(step)
                times = {"start": seconds_of(start, stream.clock), "end": seconds_of(end, stream.clock)}
                print(json.dumps(times | {"units": step.tolist()}), flush=True)
                num_units = end

    for samples in standard_input():
        num_samples += len(samples)
        began = perf_counter()
        known = stream.push(samples)
        if len(known):
            durations.append((perf_counter() - began) / -(-len(known) // stream.step))
        print_units(known)
    print_units(stream.finish())
    if not num_units:
        raise UserError(f"{num_samples} samples on standard input are too short for a unit; pipe in 16 kHz mono s16le")
    print_latency("units came", stream, durations)
