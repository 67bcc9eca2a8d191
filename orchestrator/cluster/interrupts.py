"""Ctrl-C and SIGTERM: finished work is kept, and the process exits with 130 or 143. Work in a thread next to the main one."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import Any, TypeVar

STOP_S = 20.0
"""How long workers may take to save after Ctrl-C or SIGTERM; `ray job stop` kills earlier, unless RAY_JOB_STOP_WAIT_TIME_S is set."""


class Interrupted(BaseException):
    """The user or the system asked the process to stop. It is not an Exception, so that nothing handles it as a failure."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.signum


class Interrupts:
    """Turns the first SIGINT or SIGTERM into Interrupted, raised in the main thread; a second one ends the process.

    Tune's loop must not be interrupted: during fit() the signal is passed on as SIGUSR1, on which Tune saves its
    state, stops the trials and returns.
    """

    def __init__(self) -> None:
        self.signum: int | None = None

    def install(self) -> None:
        """Take over both signals; after ray.init(), which replaces the handler of SIGTERM."""
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)

    @contextmanager
    def left_to_tune(self) -> Iterator[None]:
        """Around Tuner.fit(), which needs TUNE_DISABLE_SIGINT_HANDLER=1 to leave SIGINT to this class."""
        try:
            yield
        finally:
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        if self.signum is not None:
            raise Interrupted(self.signum)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self.signum = signum
        if callable(signal.getsignal(signal.SIGUSR1)):  # Tune listens
            os.kill(os.getpid(), signal.SIGUSR1)
        else:
            raise Interrupted(signum)


@contextmanager
def unwrapped() -> Iterator[None]:
    """Around calls into Ray: its compiled code was seen to raise SystemError from an Interrupted that came in the middle of it."""
    try:
        yield
    except SystemError as error:
        if isinstance(error.__cause__, Interrupted):
            raise error.__cause__ from None
        raise


@contextmanager
def saved_if_interrupted(training: "Future[Any]", stop_files: Sequence[Path]) -> Iterator[None]:
    """Around what waits for a training: if that is interrupted, the training is asked to save and end, and given STOP_S for it.

    stop_files: those of what the training has begun, in order; the last one is at work.
    """
    try:
        yield
    except Interrupted:
        if stop_files:
            stop_files[-1].touch()
            wait([training], timeout=STOP_S)
        raise


T = TypeVar("T")


def run_in_thread(function: Callable[[], T], name: str) -> Future[T]:
    """Start the function in a daemon thread, which ends with the process; the future has what it returns or raises."""
    future: Future[T] = Future()

    def run() -> None:
        """Fill the future."""
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True, name=name).start()
    return future
