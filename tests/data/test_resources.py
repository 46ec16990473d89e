"""The processors and the memory of this process are those of its affinity and of its control groups."""

from pathlib import Path

import pytest
import torch

from hubert_lightning.data import resources, workers
from hubert_lightning.data.workers import share_threads


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 processors and 100 GB that this process finds in files."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {*range(64)})
    monkeypatch.setattr(resources, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(resources, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(resources, "MEMORY", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal: 100000000 kB\nMemAvailable: 90000000 kB\n")
    (tmp_path / "own").write_text("")
    return tmp_path


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "cgroup" / name).write_text(text)


def test_without_control_groups_affinity_and_the_free_memory_count(groups: Path) -> None:
    assert resources.usable_cores() == 64
    assert resources.available_memory() == 90_000_000 * 1024


def test_a_group_of_version_2_and_those_around_it_limit_both(groups: Path) -> None:
    (groups / "own").write_text("0::/slurm/job7\n")
    write(groups, {"slurm/job7/cpu.max": "max 100000\n", "slurm/cpu.max": "350000 100000\n"})
    write(groups, {"slurm/job7/memory.max": "8000000\n", "slurm/job7/memory.current": "5000000\n"})
    write(groups, {"slurm/job7/memory.stat": "anon 3\ninactive_file 1000000\n", "slurm/memory.max": "max\n"})
    assert resources.usable_cores() == 4  # 3.5 processors
    assert resources.available_memory() == 4_000_000  # the cache of files can be given up


def test_groups_of_version_1_limit_both(groups: Path) -> None:
    (groups / "own").write_text("9:memory:/docker/a\n3:cpu,cpuacct:/docker/a\n0::/\n")
    write(groups, {"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"})  # its root
    write(groups, {"memory/memory.limit_in_bytes": "6000\n", "memory/memory.usage_in_bytes": "2000\n"})
    assert resources.usable_cores() == 2
    assert resources.available_memory() == 4000


def test_no_limit_of_version_1_is_no_limit(groups: Path) -> None:
    (groups / "own").write_text("3:cpu,cpuacct:/\n")
    write(groups, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"})
    assert resources.usable_cores() == 64


def test_the_ranks_of_a_host_share_its_cores_unless_the_user_sets_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(8)
        monkeypatch.setenv("OMP_NUM_THREADS", "8")
        assert share_threads(4) == 8
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.setattr(workers, "usable_cores", lambda: 6)
        assert [share_threads(ranks) for ranks in (1, 2, 4, 16)] == [6, 3, 1, 1]
    finally:
        torch.set_num_threads(before)
