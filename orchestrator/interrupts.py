"""Ctrl-C and SIGTERM: what is done is kept, and the process ends with 130 or 143."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """The user or the system asked the process to stop. No Exception, so that nothing takes it for a failure."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.signum


class Interrupts:
    """Turns the first SIGINT or SIGTERM into Interrupted, raised in the main thread; a second one ends the process.

    Tune must not be torn out of its loop: during fit() the signal is passed on as SIGUSR1, on which Tune saves its
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
        """Around Tuner.fit(), which needs TUNE_DISABLE_SIGINT_HANDLER=1 to leave SIGINT to us."""
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
