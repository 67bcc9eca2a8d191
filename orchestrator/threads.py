"""Work beside the main thread."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

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
