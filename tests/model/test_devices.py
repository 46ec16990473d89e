import pytest
import torch

from hubert_lightning.errors import UserError
from hubert_lightning.model.devices import TF32, choose_device


def rounds_to_tf32() -> set[bool]:
    return {torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32}


def test_float32_is_float32_on_the_chosen_device_unless_tf32_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TF32, raising=False)
    torch.backends.cudnn.allow_tf32 = True  # torch's default
    choose_device("cpu")
    assert rounds_to_tf32() == {False}
    monkeypatch.setenv(TF32, "1")
    choose_device("cpu")
    assert rounds_to_tf32() == {True}
    monkeypatch.setenv(TF32, "0")
    choose_device("cpu")
    assert rounds_to_tf32() == {False}
    monkeypatch.setenv(TF32, "yes")
    with pytest.raises(UserError, match="HUBERT_TF32 is 'yes'; set it to 1"):
        choose_device("cpu")
