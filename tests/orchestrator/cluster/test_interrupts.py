"""What is raised after Ctrl-C, wherever it comes."""

import signal

import pytest

from orchestrator.cluster.interrupts import Interrupted, unwrapped


@pytest.mark.parametrize(("cause", "raised"), [(Interrupted(signal.SIGINT), Interrupted), (None, SystemError)])
def test_an_interruption_in_compiled_code_stays_one(cause: BaseException | None, raised: type[BaseException]) -> None:
    """Ctrl-C in the middle of ray.get() ended a search with this SystemError, a traceback and exit code 1."""
    with pytest.raises(raised), unwrapped():
        raise SystemError("<built-in method __new__> returned a result with an exception set") from cause
