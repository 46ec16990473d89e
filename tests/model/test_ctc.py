"""The CTC loss of our kernels against torch's: run as a program, it prints what Triton's interpreter computes."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hubert_lightning.model import ctc

CASES: dict[str, dict[str, Any]] = {
    "several lengths": {"num_frames": (9, 12, 7), "num_tokens": (3, 5, 1)},
    "repeated tokens": {"num_frames": (7, 9), "num_tokens": (4, 4), "vocabulary": 2},  # 7 frames are just enough
    "no tokens": {"num_frames": (6, 4), "num_tokens": (0, 2)},
    "no tokens at all": {"num_frames": (3, 2), "num_tokens": (0, 0)},
    "too few frames": {"num_frames": (3, 8, 6), "num_tokens": (4, 4, 4), "vocabulary": 2},
    "no frames": {"num_frames": (0, 4, 0), "num_tokens": (1, 2, 0)},
    "a large vocabulary": {"num_frames": (8, 6), "num_tokens": (3, 2), "vocabulary": 70, "blank": 40},
    "several chunks of states": {"num_frames": (72,), "num_tokens": (66,)},
}  # fmt: skip
NOT_FINITE = "not finite"


def batch(
    num_frames: tuple[int, ...], num_tokens: tuple[int, ...], vocabulary: int = 6, blank: int = 0
) -> tuple[Tensor, Tensor]:
    """Random log-probabilities in float64, two frames longer than needed, and random tokens other than the blank."""
    rng = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(len(num_frames), max(num_frames) + 2, vocabulary, generator=rng, dtype=torch.float64)
    token = torch.randint(1, vocabulary, (len(num_frames), max(num_tokens) + 1), generator=rng)
    return logits.log_softmax(dim=-1), (token + blank) % vocabulary


def result(loss_of: Any, log_probs: Tensor, case: dict[str, Any]) -> dict[str, Any]:
    """Loss and gradient of three times the loss with respect to the log-probabilities."""
    x = log_probs.requires_grad_()
    token = batch(**case)[1]
    loss = loss_of(x, token, case["num_frames"], case["num_tokens"], case.get("blank", 0))
    return {"loss": loss.item(), "gradient": torch.autograd.grad(3 * loss, x)[0].tolist()}


def main() -> None:
    """Print the results of all cases."""
    results = {name: result(ctc.fused_loss, batch(**case)[0].float(), case) for name, case in CASES.items()}
    case = CASES["several lengths"]
    broken = batch(**case)[0].float()
    broken[1, 4] = torch.nan
    results[NOT_FINITE] = result(ctc.fused_loss, broken, case)
    log_probs, token = batch((2, 2), (1, 1))
    sizes = torch.tensor([[4, 4], [2, 2]], dtype=torch.int32)  # without padding, which is left as it was in memory
    torch.library.opcheck(ctc._ctc_losses, (log_probs.float().requires_grad_(), token, sizes, 0))
    print(json.dumps(results))


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout)
    return results


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_kernels_compute_the_loss_and_gradient_of_torch(interpreted: dict[str, Any], name: str) -> None:
    expected, found = result(ctc.torch_loss, batch(**CASES[name])[0], CASES[name]), interpreted[name]
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-5, atol=1e-5)  # float32 against float64
    gradients = torch.tensor(found["gradient"]), torch.tensor(expected["gradient"])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_loss_of_what_is_not_finite_is_not_finite(interpreted: dict[str, Any]) -> None:
    loss, gradient = interpreted[NOT_FINITE]["loss"], torch.tensor(interpreted[NOT_FINITE]["gradient"])
    assert loss != loss
    assert gradient.isfinite().all(dim=(1, 2)).tolist() == [True, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("states", [32, 512, ctc.MOST_STATES])
def test_kernels_compile_for_a_gpu_without_spilling(
    states: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hubert_lightning.model import ctc_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kinds = {"token": "*i64", "sizes": "*i32", **dict.fromkeys(ctc_kernels.SIZES, "i32")}
    constants = {"STATES": states, "TOKENS": ctc_kernels.TOKENS, "CHUNK": ctc_kernels.CHUNK}
    for kernel in (ctc_kernels._recursion, ctc_kernels._gradient):
        values = {name: constants[name] for name in kernel.arg_names if name in constants}
        signature = {name: "constexpr" if name in values else kinds.get(name, "*fp32") for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=values)
        options = {"num_warps": ctc_kernels.warps_of(states)}
        compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared < 48 * 1024
        assert ".local" not in compiled.asm["ptx"]


def test_torchs_loss_is_used_where_the_kernels_are_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "hubert_lightning.model.ctc_kernels", None)  # importing it fails
    monkeypatch.delattr("hubert_lightning.model.ctc_kernels", raising=False)
    with caplog.at_level(logging.WARNING):
        assert not ctc.is_right.__wrapped__(torch.device("cpu"), 32)
    [message] = caplog.messages
    assert message.startswith("The CTC loss of cpu is torch's, which waits, since our kernels do not work: ")
    assert "\n" not in message


def test_torchs_loss_is_used_where_the_kernels_are_wrong(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ctc, "fused_loss", lambda *args: ctc.torch_loss(*args) * 1.1)
    with caplog.at_level(logging.WARNING):
        assert not ctc.is_right.__wrapped__(torch.device("cpu"), 32)
    assert "differ" in caplog.text


if __name__ == "__main__":
    main()
