"""Records what a program does on a GPU that is not there."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._foreach_utils import _foreach_supported_types
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phantom.answers import ANSWERS, Answers
from phantom.costs import OVERWRITING, argument, bytes_of, flops_of, launches_nothing
from phantom.memory import Memory
from phantom.modules import Modules
from phantom.native import NativeLaunches
from phantom.places import Places
from phantom.record import Access, Copy, Mixture, Op, Operand, Record, Wait
from phantom.synchronizations import synchronizations

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""Operator, arguments, named arguments."""


class Recorder(TorchDispatchMode):
    """A context in which tensors on "cuda" have shapes but no values, and all that is done with them is recorded.

    Tensors on the CPU are real. What the host reads from the GPU comes from `answers`, and is recorded as a wait.

        with Recorder() as recorder:
            model = build().to("cuda")
            with recorder.recording("forward"):
                loss = model(batch)
                loss.backward()
        record = recorder.record()

    Args:
        packages: Packages whose lines the record names.
        answers: What the host reads from the GPU.
    """

    def __init__(self, packages: tuple[str, ...] = ("hubert_lightning",), answers: Answers | None = None) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.answers = answers or Answers()
        self.memory = Memory()
        self.modules = Modules()
        self._places, self._native, self._record = Places(packages), NativeLaunches(), Record()
        self._recording, self._phase = False, "forward"

    # ---- what is recorded, and when

    def __enter__(self) -> Self:
        if FakeTensor not in _foreach_supported_types:
            _foreach_supported_types.append(FakeTensor)  # otherwise optimizers loop over parameters
        self._lifting = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") is then seen as a copy
        self._overwriting = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # a real parameter cannot become a fake one
        self._synchronizations = synchronizations(self.wait)
        self._synchronizations.__enter__()
        self.memory.follow_resizing()
        self.modules.follow()
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self.modules.stop()
        self.memory.stop()
        self._synchronizations.__exit__(None, None, None)
        torch.__future__.set_overwrite_module_params_on_conversion(self._overwriting)
        torch._C._set_only_lift_cpu_tensors(self._lifting)

    @contextmanager
    def recording(self, phase: str = "forward") -> Iterator[None]:
        """Record what is done in this context; only memory is followed outside it.

        Args:
            phase: Part of the step that begins; backward passes and optimizers are recognised.
        """
        if not self._record.ops:
            self._record.since = self.memory.tick
        before = self._recording, self._phase
        self._recording, self._phase = True, phase
        try:
            yield
        finally:
            self._recording, self._phase = before

    def begin(self, phase: str) -> None:
        """Begin another part of the step."""
        self._phase = phase

    def record(self, result: Any = None) -> Record:
        """Return what was recorded.

        Args:
            result: Any value of JSON to return with it.
        """
        storages = [replace(storage) for storage in self.memory.storages]  # those held now are released later
        return replace(self._record, storages=storages, result=result)

    def wait(self, what: str) -> None:
        """Record that the host waits for the GPU."""
        if self._recording:
            line, phase = self._place()
            stack = self._places.stack()
            self._record.waits.append(Wait(what, phase, line or (stack[0] if stack else ""), stack))

    def _place(self) -> tuple[str, str]:
        line, optimizing = self._places.line()
        if torch._C._current_autograd_node() is not None:  # type: ignore[attr-defined]
            return line or self.modules.of_backward()[1], "backward"
        return line, "optimizer" if optimizing else self._phase

    # ---- operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device = kwargs.get("device")
        on_gpu = any(tensor.device.type == "cuda" for tensor in tensors)
        if func.namespace == "prim" or not (on_gpu or (device is not None and torch.device(device).type == "cuda")):
            if any(isinstance(tensor, FakeTensor) for tensor in tensors):
                with self.fake:
                    return func(*args, **kwargs)
            return func(*args, **kwargs)
        if _is_composite(func):  # as in inference mode, where autograd does not take it apart
            TorchDispatchMode.__enter__(self)
            try:
                return func.decompose(*args, **kwargs)
            finally:
                TorchDispatchMode.__exit__(self, None, None, None)
        call = (func, args, kwargs)
        name = func.overloadpacket.__name__
        if name in ANSWERS:
            return ANSWERS[name](self, call, self._computed)
        if name in ("_to_copy", "copy_"):
            return self._copied(call)
        return self._computed(call)

    def _computed(self, call: Call) -> Any:
        """Compute the shapes of an operation's results, and record it."""
        func, args, kwargs = call
        try:
            with self.fake:
                out = func(*args, **kwargs)
        except RuntimeError:
            devices = {str(leaf.device) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            if len(devices) > 1:
                self._mixed(func, devices)
            raise
        self.log(call, out)
        return out

    def _mixed(self, func: Any, devices: set[str]) -> None:
        line, _ = self._place()
        mixture = Mixture(str(func), tuple(sorted(devices)), line, self._places.stack())
        self._record.mixtures.append(mixture)

    def _copied(self, call: Call) -> Any:
        func, args, kwargs = call
        into = func.overloadpacket.__name__ == "copy_"
        source = args[1] if into else args[0]
        target = args[0].device if into else torch.device(kwargs.get("device") or source.device)
        if source.device.type == target.type:
            return self._computed(call)
        blocking = not argument(func, "non_blocking", args, kwargs)
        if target.type == "cuda":
            with self.fake:
                out = func(*args, **kwargs)
            self._allocate([out])
            pinned = source.is_pinned()
            if source.dtype == out.dtype:
                self.answers.remember(out, source)
        else:
            # With non_blocking, torch copies into pinned memory of its own
            pinned = args[0].is_pinned() if into else not blocking
            out = self.answers.read(source, kwargs.get("dtype") or (args[0].dtype if into else source.dtype))
            if into:
                out = args[0].copy_(out)
            elif pinned:
                out = out.pin_memory()
        self._log_copy(source, target.type == "cuda", pinned, blocking)
        return out

    def _log_copy(self, source: Tensor, to_gpu: bool, pinned: bool, blocking: bool) -> None:
        if not self._recording:
            return
        line, phase = self._place()
        self._record.copies.append(Copy(to_gpu, bytes_of(source), pinned, blocking, phase, line))
        if blocking or not pinned:
            memory = "pinned" if pinned else "pageable"
            asked = "blocking" if blocking else "non_blocking"
            way = "to" if to_gpu else "from"
            self.wait(f"{asked} copy of {tuple(source.shape)} {way} the GPU, {memory} memory")

    def log(self, call: Call, out: Any) -> None:
        """Record an operation and what it allocated.

        Args:
            call: The operation.
            out: What it returned.
        """
        func, args, kwargs = call
        outs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        line, phase = self._allocate(outs, changed=func.namespace != "c10d")  # peers have no values to send
        self.modules.log_forward(line)
        if not self._recording or launches_nothing(func):
            return
        ins = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = func.overloadpacket.__name__
        launches, waits = self._native.counts(call)
        for _ in range(waits):
            self.wait(f"inside {name}")
        written = {id(tensor): tensor for tensor in (*_mutated(call), *outs)}
        reads = [tensor for tensor in ins if not (name in OVERWRITING and tensor is args[0])]
        accesses = [
            tuple(
                Access(self.memory.number(tensor), bytes_of(tensor))
                for tensor in tensors
                if tensor.device.type == "cuda"
            )
            for tensors in (reads, written.values())
        ]
        results = [*outs, *written.values(), *ins]
        self._record.ops.append(
            Op(
                name=name,
                phase=phase,
                module=self.modules.of_backward()[0] if phase == "backward" else self.modules.current,
                line=line,
                flops=flops_of(func, args, kwargs, out),
                bytes=sum(access.bytes for part in accesses for access in part),
                dtype=_name(results[0].dtype) if results else "",
                launches=launches,
                ins=tuple(map(_operand, ins)),
                outs=tuple(map(_operand, outs)),
                reads=accesses[0],
                writes=accesses[1],
                dropout="attention" in name and bool(argument(func, "dropout_p", args, kwargs)),
            )
        )

    def _allocate(self, outs: list[Tensor], changed: bool = True) -> tuple[str, str]:
        line, phase = self._place()
        for tensor in outs:
            if isinstance(tensor, FakeTensor) and tensor.device.type == "cuda":
                if changed:
                    self.answers.forget(tensor)
                self.memory.allocate(tensor, line, phase)
        return line, phase


@cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


@cache
def _indices_of_mutated(func: Any) -> tuple[int, ...]:
    return tuple(
        index
        for index, parameter in enumerate(func._schema.arguments)
        if parameter.alias_info is not None and parameter.alias_info.is_write
    )


def _mutated(call: Call) -> list[Tensor]:
    func, args, kwargs = call
    given = [args[index] for index in _indices_of_mutated(func) if index < len(args)]
    given += [kwargs[name] for name in ("out",) if name in kwargs]
    return [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]


def _operand(tensor: Tensor) -> Operand:
    return Operand(tuple(tensor.shape), _name(tensor.dtype), tensor.stride(), tensor.device.type)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
