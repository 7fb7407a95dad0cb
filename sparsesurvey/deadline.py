"""An end that must be kept: work stops by an exception when its time is over."""

import faulthandler
import signal
from collections.abc import Iterator
from contextlib import contextmanager

HARD = 20  # seconds after the deadline in which a call that Python cannot interrupt is given up


class OutOfTime(BaseException):
    """The minutes are over. As a Ctrl-C it is no error of the kernel that it interrupts, and nobody may forgive it."""


@contextmanager
def timed_out(seconds: float) -> Iterator[None]:
    """OutOfTime after so many seconds; a call that never comes back to Python ends the process a little later."""
    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, seconds))
    faulthandler.dump_traceback_later(max(0.01, seconds) + HARD, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()
