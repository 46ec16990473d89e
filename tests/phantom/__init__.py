"""A GPU that is not there: what a program would launch on it, move to it, hold on it, and wait for.

`phantom.c` answers the CUDA calls of torch as one H200, so that torch's host code runs as it does on the machine.
`Recorder` keeps tensors on the GPU to their shapes, and lists every operation, copy, host wait and storage. `Phantom`
runs functions of a module in processes that see the phantom, and returns what they recorded:

    with Phantom() as phantom:
        record = phantom.run("steps:pretraining", layers=2)
    assert not record.waits

The tests of this package and the programs in `benchmarks/` share it. Nothing here runs a kernel: numbers are shapes,
counts and bytes, not times.
"""
