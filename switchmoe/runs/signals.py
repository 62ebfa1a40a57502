"""Signals that ask a run to stop: it leaves after the step under way, with its state saved."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


class Stopped(BaseException):
    """A signal asked the run to stop; its state is saved. ``args``: message, signal number.

    No `Exception`, as KeyboardInterrupt is none: raised inside a library's call, it must not be taken for its failure.
    """


class Stop:
    """The number of the SIGTERM or SIGINT that came, if any; a second one acts at once."""

    def __init__(self) -> None:
        self.number = 0
        self.deferred = False  # until there is a state to save, the signal itself raises `Stopped`

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name

    def due(self, step: int) -> bool:
        """Whether to leave before ``step``; with several processes all ask, and all get the same answer."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.number = signal.SIGTERM
        return self.number != 0


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Notes signals while inside. With several processes JAX itself notes the SIGTERM of any of them."""
    stop = Stop()

    def note(number: int, frame: Any) -> None:
        stop.number = number
        signal.signal(number, before[number])
        if not stop.deferred:
            raise Stopped(f"stopped by {stop.name} before the first step", number)

    noted = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
    before = {number: signal.signal(number, note) for number in noted}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
