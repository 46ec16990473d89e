"""A few hundred damaged files of every kind: a sentence or success for each, at a bounded cost, and nothing runs."""

import os
import shutil
from pathlib import Path

import pytest
from mutations import READERS, Reader, campaign, copied, made, outcome


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutations")


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_damaged_file_ends_in_success_or_in_one_sentence(folder: Path, reader: Reader) -> None:
    wrong = [
        f"mutation {number}, {how}: {found.verdict}\n{found.said}"
        for _, number, how, found in campaign(folder, seed=0, count=8, readers=[reader])
        if not found.is_right
    ]
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_pipe_and_a_device_are_no_files(folder: Path, reader: Reader) -> None:
    """Nobody writes to the pipe, and the device has zeros without end."""
    sound = made(reader, folder)
    files = sorted({path for pattern in reader.mutated for path in sound.glob(pattern) if path.is_file()})
    for number, path in enumerate(files[:4]):
        damaged = copied(sound, folder / "damaged")
        place = damaged / path.relative_to(sound)
        place.unlink()
        if number % 2:
            place.symlink_to("/dev/zero")
        else:
            os.mkfifo(place)
        found = outcome(reader, damaged, [place.name])
        assert found.is_right, f"{place.name}: {found.verdict} {found.said}"
        shutil.rmtree(folder / "new", ignore_errors=True)
