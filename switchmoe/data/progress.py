"""A sign of life from work that takes longer than a user would wait in silence."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

Note = Callable[[str], None]  # shows a line
EVERY = 10.0  # seconds


@contextlib.contextmanager
def told(
    note: Note, what: str, state: Callable[[], str] = lambda: "", at_once: bool = False
) -> Iterator[None]:
    """While inside, a line every `EVERY` seconds; nothing for what is done sooner.

    Args:
      state: how far it has got, in a few words.
      at_once: a line before the first of these as well, of work that always takes some seconds.
    """
    over, began = threading.Event(), time.monotonic()
    if at_once:
        note(f"{what} ...")

    def tell() -> None:
        while not over.wait(EVERY):
            far = state()
            note(f"{what}: {f'{far}, ' if far else ''}{time.monotonic() - began:.0f} s so far")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
