"""Training steps on a GPU, as far as a phantom shows: what they launch, hold and wait for."""

from phantom.device import Run


def test_a_step_of_pretraining_neither_waits_nor_mixes_devices(recorded: Run) -> None:
    record = recorded("training_steps:pretraining")
    assert not record.mixtures
    assert not record.waits
    assert {op.phase for op in record.ops} == {"forward", "backward", "finish", "optimizer"}
    assert all(copy.to_gpu and copy.pinned and copy.phase == "transfer" for copy in record.copies)
