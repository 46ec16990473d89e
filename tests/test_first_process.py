"""Which process of a run prints."""

import os

import pytest

from hubert_lightning.first_process import is_first_process


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0", "NODE_RANK": "1", "GROUP_RANK": "0"}, True),  # torchrun numbers nodes itself
        ({"RANK": "3", "LOCAL_RANK": "0", "NODE_RANK": "0", "GROUP_RANK": "1"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0", "SLURM_PROCID": "1"}, True),  # srun torchrun
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, True),
        ({"SLURM_PROCID": "8", "SLURM_LOCALID": "0"}, False),
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, False),  # started by Lightning, in an interactive job
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
        ({"NODE_RANK": "1"}, False),  # which Lightning will start the others of
        ({"LOCAL_RANK": "1"}, False),
        ({"JSM_NAMESPACE_RANK": "2"}, False),
        ({"OMPI_COMM_WORLD_RANK": "1"}, False),
        ({"PMI_RANK": "0"}, True),
    ],
)
def test_one_process_of_a_run_is_the_first(
    variables: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in os.environ:
        if "RANK" in name or name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() == first
