"""Only mistakes of the user are shown without a traceback."""

import pytest
from torch.utils.data import DataLoader, Dataset

from hubert_lightning import errors
from hubert_lightning.data.workers import killed_worker
from hubert_lightning.errors import UserError, answer_to, explains_errors, user_error, within
from hubert_lightning.training.callbacks.stalls import ended_rank


class Broken(Dataset[int]):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise self.error


def test_a_bug_is_no_mistake_of_the_user() -> None:
    assert user_error(ValueError("invalid literal for int()")) is None


def test_a_mistake_is_found_behind_the_errors_of_libraries() -> None:
    mistake, wrapped = UserError("x is 3; lower it"), ValueError("Problem with given class_path")
    wrapped.__cause__ = mistake
    assert user_error(wrapped) is mistake


@pytest.mark.parametrize("sentence", ["a.wav: cannot be decoded; remove it", "a.wav: two\nlines: UserError: of text"])
def test_a_mistake_in_a_loader_worker_is_the_sentence_alone(sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        list(DataLoader(Broken(UserError(sentence)), num_workers=1))
    assert str(user_error(caught.value)) == sentence


@pytest.mark.slow
def test_a_bug_in_a_loader_worker_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="__getitem__") as caught:
        list(DataLoader(Broken(ValueError("invalid literal")), num_workers=1))
    assert user_error(caught.value) is None


def test_a_later_room_explains_errors_that_the_end_of_its_process_causes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_explanations", [lambda error: None])
    explains_errors(lambda error: "the worker was killed; lower its memory" if "worker" in str(error) else None)
    assert answer_to(RuntimeError("worker 3 is gone")) == ("the worker was killed; lower its memory", 1)
    assert answer_to(RuntimeError("a bug")) is None
    assert answer_to(ValueError("worker 3 is gone")) is None


def test_the_rooms_that_start_processes_explain_their_ends() -> None:
    assert {killed_worker, ended_rank} <= set(errors._explanations)


@pytest.mark.parametrize("number", [-1, 11, float("nan"), float("inf")])
def test_numbers_outside_of_a_range_are_refused_by_name(number: float) -> None:
    with pytest.raises(UserError, match=f"steps is {number}; it is a number from 0 to 10"):
        within(0, 10, steps=number)
