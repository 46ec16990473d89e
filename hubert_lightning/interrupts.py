"""Ctrl-C, SIGTERM and SIGUSR1, heard at once: also while the main thread waits in a library for another process.

Python runs a signal handler only when the main thread returns to Python, which it does not while it waits for another
rank. So a thread reads the numbers of the signals as they arrive. The handler in the main thread raises `Interrupted`,
unless the work is `held`; the thread says what happens, and ends the process if the main thread cannot.
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
from typing import Any, NoReturn

from hubert_lightning.console import is_first_process

AFTER_STEP = "saving after this step"
SAME = 0.2
"""Seconds within which two signals are one: `timeout` and process managers send to the process and to its group."""
PATIENCE = 10.0
"""Seconds in which the main thread must react to a signal before the process is ended without it."""


def name_of(number: int) -> str:
    """A signal as its sentence calls it."""
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
        numbers: Signals to hear.
        sentence: Function from the name of a signal to what is said when the command ends at once.
    """

    def __init__(self, numbers: Sequence[int], sentence: Callable[[str], str] | None) -> None:
        self.numbers, self.sentence = numbers, sentence
        self.heard = 0
        """Signal that the main thread knows of, 0 if none."""
        self.saving = AFTER_STEP
        """What happens after a signal while the work is held."""
        self.speaks = is_first_process()
        """Whether this process is the one of its run that prints."""
        self.launched: list[subprocess.Popen] = []
        """Processes of the same run that this one started, which end with it."""
        self._held = 0
        self._repeats = 0
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._swallowed
        self._first: float | None = None
        self._timer: threading.Timer | None = None
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        self._ear, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        self._fd = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="interrupts", daemon=True)
        self._thread.start()

    def hold(self) -> None:
        """From now on a signal is noted in `heard`, and raises nothing."""
        self._held += 1

    def release(self) -> None:
        """Raise `Interrupted` if a signal was heard while the work was held."""
        self._held -= 1
        if not self._held and self.heard:
            raise Interrupted(self.heard)

    def drop(self) -> None:
        """Hold nothing any more, after an error."""
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
            # While Python exits after the first signal, a second one would be a traceback
            signal.signal(number, _exit_now if self.heard else handler)
        self._mouth.setblocking(True)
        self._mouth.send(b"\0")
        self._thread.join()
        if self._timer:
            self._timer.cancel()
        self._mouth.close()
        self._ear.close()

    def end_now(self, number: int) -> NoReturn:
        """End this process and those it started, without the main thread."""
        end_process(128 + number, self.launched)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.heard = not self.heard, self.heard or number
        if first and not self._held:
            if self.sentence is None:
                raise KeyboardInterrupt
            for process in self.launched:
                process.terminate()
            raise Interrupted(number)

    def _swallowed(self, error: Any) -> None:
        """Raise again what came up where Python raises nothing: in a finalizer, or while a process is forked."""
        if not issubclass(error.exc_type, (Interrupted, KeyboardInterrupt)):
            self._unraisable(error)
            return
        number, self.heard = self.heard, 0
        self._repeats += 1
        again = threading.Timer(0.05, signal.pthread_kill, [threading.main_thread().ident, number])
        again.daemon = True
        again.start()

    def _listen(self) -> None:
        while True:
            for number in self._ear.recv(64):
                if number == 0:
                    return
                if number in self.numbers and self._repeats:
                    self._repeats -= 1
                elif number in self.numbers:
                    self._hear(number)

    def _hear(self, number: int) -> None:
        name = name_of(number)
        now = time.monotonic()
        if self._first is None:
            self._first = now
            if self._held:
                self.say(f"{name}: {self.saving}; a second one ends at once")
            elif self.sentence is not None:
                self.say(self.sentence(name))
                self._timer = threading.Timer(PATIENCE, self.end_now, [number])
                self._timer.daemon = True
                self._timer.start()
        elif now - self._first > SAME:
            self.say(f"{name} again: ended at once; what was saved before is kept")
            self.end_now(number)

    def say(self, sentence: str) -> None:
        if self.speaks:
            print(f"hubert: {sentence}", file=sys.stderr, flush=True)


_current: Interrupts | None = None


def current() -> Interrupts | None:
    """The signals of the command that runs, none outside of `listening`."""
    return _current


@contextmanager
def listening(numbers: Sequence[int], sentence: Callable[[str], str] | None = None) -> Iterator[None]:
    """Hear signals until the command ends. Inside of another command, and outside of the main thread, that one's stay.

    Args:
        numbers: Signals to hear.
        sentence: Function from the name of a signal to what is said; a command without one gets `KeyboardInterrupt`.
    """
    global _current
    if _current is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _current = Interrupts(numbers, sentence)
    seconds: float | None = 1.0  # after an error, which this process is to report, and not each of them
    try:
        yield
        seconds = None
    except SystemExit:
        seconds = PATIENCE
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
    """Threads that begin nothing more after an interrupt or an error; a plain pool would do all that it was given."""
    pool = ThreadPoolExecutor()
    try:
        yield pool
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


def ignore_interrupts() -> None:
    """Let a worker process finish what its command still asks for: its command hears the signals, and ends it.

    A terminal sends Ctrl-C, and `timeout` and process managers SIGTERM, to every process of a command. Torch and
    multiprocessing end a worker that hangs by SIGTERM, twice; so the second one ends it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL) and None)


def end_process(code: int, launched: Sequence[subprocess.Popen] = ()) -> NoReturn:
    """End this process from any thread, with its workers and the processes that it launched."""
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
    """In a forked process: its signals are none of the command's, which would count them."""
    global _current
    if _current is not None:
        signal.set_wakeup_fd(-1)
        numbers, _current = _current.numbers, None
        for number in numbers:
            signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)


os.register_at_fork(after_in_child=_leave_to_parent)
