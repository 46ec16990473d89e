"""A few hundred damaged files of every kind: a sentence or success for each, at a bounded cost, and nothing runs."""

from pathlib import Path

import pytest
from mutations import READERS, Reader, campaign


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_damaged_file_ends_in_success_or_in_one_sentence(tmp_path: Path, reader: Reader) -> None:
    wrong = [
        f"mutation {number}, {how}: {found.verdict}\n{found.said}"
        for _, number, how, found in campaign(tmp_path, seed=0, count=10, readers=[reader])
        if not found.is_right
    ]
    assert not wrong, "\n\n".join(wrong)
