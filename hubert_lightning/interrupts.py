"""Ctrl-C, SIGTERM and SIGUSR1, received at once even while the main thread waits in a library call.

Python runs a signal handler only when the main thread returns to Python, which it does not while it waits for another
rank. So a thread reads the numbers of the signals as they arrive. The handler in the main thread raises `Interrupted`,
unless the work is `held`; the thread prints a sentence, and ends the process if the main thread cannot.
"""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from hubert_lightning.first_process import is_first_process

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that end a verb which trains or tests a model."""
AFTER_STEP = "saving after this step"
SAME_SIGNAL = 0.2
"""Seconds within which two signals count as one: `timeout` and process managers send to a process and to its group."""
REACTION_TIME = 10.0
"""Seconds in which the main thread must react to a signal before the process is ended without it."""


def name_of(number: int) -> str:
    """Return the name of a signal for messages: Ctrl-C, SIGTERM, …."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class Interrupted(SystemExit):
    """A signal ended the command.

    Args:
        number: Signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


class Interrupts:
    """The signals of one command.

    Args:
        numbers: Signals to receive.
        sentence: Function from the name of a signal to the sentence that is printed when the command ends at once.
    """

    def __init__(self, numbers: Sequence[int], sentence: Callable[[str], str] | None) -> None:
        self.numbers, self.sentence = numbers, sentence
        self.received = 0
        """Signal that the main thread knows of, 0 if none."""
        self.saving = AFTER_STEP
        """Effect of a signal while the work is held, for its message."""
        self.prints = is_first_process()
        """Whether this process is the one of its run that prints."""
        self.launched: list[subprocess.Popen[bytes]] = []
        """Processes of the same run that this one started, which end with it."""
        self._held = 0
        self._repeats = 0
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._raise_again
        self._first: float | None = None
        self._timer: threading.Timer | None = None
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="interrupts", daemon=True)
        self._thread.start()

    def hold(self) -> None:
        """Note signals in `received` from now on, and raise nothing."""
        self._held += 1

    def release(self) -> None:
        """Raise `Interrupted` if a signal arrived while the work was held."""
        self._held -= 1
        if not self._held and self.received:
            raise Interrupted(self.received)

    def drop(self) -> None:
        """Stop holding signals, after an error."""
        self._held = 0

    def restore(self, seconds: float | None) -> None:
        """Wait for the launched processes, then restore the handlers.

        Args:
            seconds: Seconds after which, as at a signal, launched processes are killed; None to wait for their end.
        """
        until = None if seconds is None else time.monotonic() + seconds
        try:
            for process in self.launched:
                process.wait(None if until is None else max(until - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in self.launched:
                process.kill()
            self._restore_handlers()

    def _restore_handlers(self) -> None:
        signal.set_wakeup_fd(self._fd)
        sys.unraisablehook = self._unraisable
        for number, handler in self._before.items():
            # While Python exits after the first signal, a second one would print a traceback
            signal.signal(number, _exit_now if self.received else handler)
        self._writer.setblocking(True)
        self._writer.send(b"\0")
        self._thread.join()
        if self._timer:
            self._timer.cancel()
        self._writer.close()
        self._reader.close()

    def end_now(self, number: int) -> NoReturn:
        """End this process and those it started by a signal, without the main thread."""
        end_process(128 + number, self.launched)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_first, self.received = not self.received, self.received or number
        if is_first and not self._held:
            if self.sentence is None:
                raise KeyboardInterrupt
            for process in self.launched:
                process.terminate()
            raise Interrupted(number)

    def _raise_again(self, error: "UnraisableHookArgs") -> None:
        """Raise an interrupt again if it arrived where Python discards exceptions: in a finalizer, or during a fork."""
        if not issubclass(error.exc_type, (Interrupted, KeyboardInterrupt)):
            self._unraisable(error)
            return
        number, self.received = self.received, 0
        self._repeats += 1
        again = threading.Timer(0.05, signal.pthread_kill, [threading.main_thread().ident, number])
        again.daemon = True
        again.start()

    def _listen(self) -> None:
        while True:
            for number in self._reader.recv(64):
                if number == 0:
                    return
                if number in self.numbers and self._repeats:
                    self._repeats -= 1
                elif number in self.numbers:
                    self._react(number)

    def _react(self, number: int) -> None:
        name = name_of(number)
        now = time.monotonic()
        if self._first is None:
            self._first = now
            if self._held:
                self.show(f"{name}: {self.saving}; a second one ends at once")
            elif self.sentence is not None:
                self.show(self.sentence(name))
                self._timer = threading.Timer(REACTION_TIME, self.end_now, [number])
                self._timer.daemon = True
                self._timer.start()
        elif now - self._first > SAME_SIGNAL:
            self.show(f"{name} again: ended at once; what was saved before is kept")
            self.end_now(number)

    def show(self, sentence: str) -> None:
        """Print a sentence, in the process of the run that prints."""
        if self.prints:
            print(f"hubert: {sentence}", file=sys.stderr, flush=True)


_current: Interrupts | None = None


def current() -> Interrupts | None:
    """Return the signals of the command that runs, None outside of `listening`."""
    return _current


@contextmanager
def listening(numbers: Sequence[int], sentence: Callable[[str], str] | None = None) -> Iterator[None]:
    """Receive signals until the command ends.

    Inside of another command, and outside of the main thread, nothing changes.

    Args:
        numbers: Signals to receive.
        sentence: Function from the name of a signal to the sentence that is printed; a command without one gets
            `KeyboardInterrupt`.
    """
    global _current
    if _current is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _current = Interrupts(numbers, sentence)
    seconds: float | None = 1.0  # after an error: this process reports it, the launched ones need not
    try:
        yield
        seconds = None
    except SystemExit:
        seconds = REACTION_TIME
        raise
    finally:
        ended, _current = _current, None
        ended.restore(seconds)


@contextmanager
def held() -> Iterator[None]:
    """Finish a piece of work before a signal ends the command."""
    if _current is None:
        yield
        return
    _current.hold()
    try:
        yield
    except BaseException:
        _current.drop()
        raise
    _current.release()


@contextmanager
def thread_pool() -> Iterator[ThreadPoolExecutor]:
    """Threads that begin no more work after an interrupt or an error; a plain pool would finish all of its queue."""
    pool = ThreadPoolExecutor()
    try:
        yield pool
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


def ignore_interrupts() -> None:
    """Let a worker process finish the work of its command, which receives the signals and ends the worker.

    A terminal sends Ctrl-C, and `timeout` and process managers SIGTERM, to every process of a command. Torch and
    multiprocessing end a worker that hangs by SIGTERM, twice; so the second one ends it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL) and None)


@contextmanager
def no_workers_left() -> Iterator[None]:
    """Kill the workers of a command that fails; Python would wait for them at its exit, and they ignore one SIGTERM."""
    try:
        yield
    except BaseException:
        for child in multiprocessing.active_children():
            if child.daemon:
                child.kill()
        raise


def end_process(code: int, launched: Sequence[subprocess.Popen[bytes]] = ()) -> NoReturn:
    """End this process from any thread, with its workers and the processes that it launched.

    Args:
        code: Exit status.
        launched: Processes that end with it.
    """
    for child in multiprocessing.active_children():
        child.kill()
    for process in launched:
        process.kill()
    # In a thread of its own: the main thread may hold the lock of a stream
    flushing = threading.Thread(target=lambda: (sys.stdout.flush(), sys.stderr.flush()), daemon=True)
    flushing.start()
    flushing.join(1)
    os._exit(code)


def _exit_now(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


def _leave_to_parent() -> None:
    """Keep the signals of a forked process from the command, which would count them."""
    global _current
    if _current is not None:
        signal.set_wakeup_fd(-1)
        numbers, _current = _current.numbers, None
        for number in numbers:
            signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)


os.register_at_fork(after_in_child=_leave_to_parent)
