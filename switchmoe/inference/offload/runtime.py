"""Experts brought into memory as a program asks for them, within a budget, and read ahead while it computes.

`Pager` is what a program's layers call (`shelf`): it waits until a layer's experts are at hand, then has threads read what
the next layer is likely to need. What the layer at work reads can't leave. What was foreseen and is not begun when the
next layer asks is forgotten; what is asked for is read first. What is read ahead has only the room that no layer may need, so
a layer never waits for an expert that it did not ask for.

Letters: E experts, L sparse layers.
"""

import collections
import dataclasses
import mmap
import threading
import time
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from switchmoe.inference.offload.cache import Cache, Key
from switchmoe.inference.offload.layout import FORMS, Layer, numpy_type
from switchmoe.inference.offload.memory import Memory, give_back
from switchmoe.inference.offload.predict import Table
from switchmoe.inference.offload.store import Store, StoreError

READERS = 3  # threads that read
AHEAD = 1  # of these read ahead at once, at most
PATIENCE = 60.0  # seconds that a layer waits for the disk
TRIM_EVERY = 10.0  # seconds, at least, between what is given back to the system
MOST_CONTEXTS = 32  # experts of a layer, beyond which a table is asked for a layer's shares alone


@dataclasses.dataclass
class Counts:
    """What became of the experts that layers asked for."""

    hits: int = 0
    misses: int = 0  # with those that were on their way
    read: int = 0  # bytes
    ahead: int = 0  # of these read ahead
    useful: int = 0  # of these used before they left
    guessed: int = 0  # experts that were foreseen, at hand or not
    right: int = 0  # of these that the next layer asked for
    waited: float = 0.0  # seconds

    def __str__(self) -> str:
        uses = self.hits + self.misses
        foreseen = ""
        if self.guessed:
            foreseen = (
                f", {self.right:,} of {self.guessed:,} foreseen asked for ({self.right / self.guessed:.1%})"
            )
        if self.ahead:
            foreseen += f", {self.useful / 1e6:,.1f} of {self.ahead / 1e6:,.1f} MB read ahead used"
        return (
            f"experts: {self.hits:,} of {uses:,} at hand ({self.hits / max(uses, 1):.1%}), {self.misses:,} waited for"
            f" ({self.waited:.1f} s), {self.read / 1e6:,.1f} MB read{foreseen}"
        )


class Pager:
    """Brings experts in. One program at a time may ask.

    Args:
      layers: the store's as they lie in memory: numbers that are no integers may be of another type, or turned.
      kept: the type that numbers are rounded to first.
      budget: bytes of experts in memory.
      policy: of `cache.Cache`.
      table: foresees what comes next, where what a layer calls with does not say so.
      patience: seconds that a layer waits for the disk.

    Raises:
      ValueError: a table of another model.
    """

    def __init__(
        self,
        store: Store,
        layers: Sequence[Layer],
        kept: str,
        budget: int,
        policy: str = "lfru",
        table: Table | None = None,
        patience: float = PATIENCE,
    ):
        self.counts, self.budget = Counts(), budget
        self._store, self._layers, self._kept, self._table, self._patience = (
            store,
            layers,
            kept,
            table,
            patience,
        )
        self.memory = Memory(layers)
        self._cache = Cache(budget, self._size, policy, len(layers))
        self._changed = threading.Condition()
        self._ready: set[Key] = set()
        self._reading: dict[Key, bool] = {}  # and whether ahead
        self._fresh: set[Key] = set()  # read ahead and not used yet
        self._demand: collections.deque[Key] = collections.deque()
        self._ahead: collections.deque[Key] = collections.deque()
        self._pinned: frozenset[Key] = frozenset()
        self._failed: OSError | None = None
        self._closed, self._trimmed = False, -TRIM_EVERY
        self._pass: list[
            tuple[int, Collection[int]]
        ] = []  # layers and what they chose, of this way through them
        self._follows: dict[int, int] = {}  # which layer came after one, last time
        # A layer, and what it was foreseen to ask for.
        self._guess: tuple[int, frozenset[Key]] = (-1, frozenset())
        self._reserved = 0  # bytes, the most that a layer of some program may need
        self._threads = [
            threading.Thread(target=self._work, name="experts", daemon=True) for _ in range(READERS)
        ]
        for thread in self._threads:
            thread.start()

    def _size(self, key: Key) -> int:
        return self._layers[key[0]].record(key[1]).size

    def least(self, rows: int) -> int:
        """Bytes that a program needs in which so many rows may meet in a layer."""
        return max(self._need(number, rows) for number in range(len(self._layers)))

    def _need(self, layer: int, experts: int) -> int:
        found = self._layers[layer]
        return sum(sorted((found.record(e).size for e in range(len(found.forms))), reverse=True)[:experts])

    def fits(self, layer: int, experts: int) -> None:
        """Keeps room for so many experts of a layer, or all if it has fewer; raises ValueError, one line: they don't fit at once."""
        experts = min(experts, len(self._layers[layer].forms))
        need = self._need(layer, experts)
        if need > self.budget:
            raise ValueError(
                f"--expert_memory={self.budget}: {self._layers[layer].name} may need {experts} experts at once; accepted is"
                f" {self.least(experts)} bytes or more"
            )
        self._reserved = max(self._reserved, need)

    def holds(self, experts: int) -> None:
        """Raises ValueError, one line: so many experts of some layer don't fit at once."""
        for number in range(len(self._layers)):
            self.fits(number, experts)

    def __call__(self, layer: int, rows_E: Any, _: Any = None, likely_E: Any = None) -> np.ndarray:
        """A layer asks for the experts that have rows, and is answered when they are at hand, or never will be (`check`)."""
        self._trim()  # a program that calls was compiled before
        rows_E = np.asarray(rows_E)
        chosen = np.flatnonzero(rows_E).tolist()
        self._bring(layer, [(layer, expert) for expert in chosen])
        self._foresee(layer, chosen, None if likely_E is None else np.asarray(likely_E))
        return rows_E

    def check(self) -> None:
        """Raises the OSError of what could not be read since the last call: then what was computed is nothing.

        What that program still waited for is forgotten: whatever becomes of it is not the next one's.
        """
        with self._changed:
            failed, self._failed = self._failed, None
            if failed:
                self._pinned = frozenset()
                for key in self._demand:
                    self._leave(key)
                self._demand.clear()
        if failed:
            raise failed

    def _trim(self) -> None:
        if time.monotonic() - self._trimmed >= TRIM_EVERY:
            give_back()
            self._trimmed = time.monotonic()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _bring(self, layer: int, wanted: list[Key]) -> None:
        with self._changed:
            if self._failed:
                return
            self._pinned = frozenset(wanted)
            self._ahead.clear()
            foreseen, self._guess = self._guess, (-1, frozenset())
            if foreseen[0] == layer:
                self.counts.guessed += len(foreseen[1])
                self.counts.right += len(foreseen[1] & self._pinned)
            lacking, missed = [], 0
            for key in wanted:
                there = self._cache.used(key)
                if there and key in self._fresh:
                    self._fresh.remove(key)
                    self.counts.useful += self._size(key)
                if not there:
                    lacking.append(key)
                missed += key not in self._ready
            self.counts.hits += len(wanted) - missed
            self.counts.misses += missed
            if not missed:
                return
            began = time.monotonic()
            if self._admitted(lacking, began):
                self._wait(wanted, began)
            self.counts.waited += time.monotonic() - began

    def _admitted(self, lacking: list[Key], began: float) -> bool:
        """Makes room and has them read; waits for what is still being read ahead, where it is in the way."""
        for key in lacking:
            while not self._take_in(key):
                under_way = [*self._reading, *self._demand]
                if not under_way:
                    self._failed = OSError(f"--expert_memory={self.budget}: no room for expert {key}")
                    return False
                if not self._changed.wait(max(0.0, began + self._patience - time.monotonic())):
                    self._failed = self._late(under_way[0])
                    return False
            self._demand.append(key)
            self._changed.notify_all()
        return True

    def _wait(self, wanted: list[Key], began: float) -> None:
        done = lambda: self._failed or self._ready.issuperset(wanted)  # noqa: E731
        if not self._changed.wait_for(done, max(0.0, began + self._patience - time.monotonic())):
            self._failed = self._late(next(key for key in wanted if key not in self._ready))

    def _late(self, key: Key) -> StoreError:
        name, path = self._layers[key[0]].name, self._store.path(key[0])
        return StoreError(
            f"expert {key[1]} of {name} in {path} was not read within {self._patience:g} s: the disk is slow, or gone"
        )

    def _take_in(self, key: Key) -> bool:
        """Has room made for it, of what may leave."""
        leaving = self._cache.admit(key, self._pinned | self._reading.keys() | set(self._demand))
        if leaving is None:
            return False
        for number, old in enumerate(leaving):
            self._ready.discard(old)
            self._fresh.discard(old)
            if number:
                self.memory.empty(*old)
            else:
                self.memory.move(old, key)
        return True

    def _foresee(self, layer: int, chosen: list[int], likely_E: np.ndarray | None) -> None:
        if self._pass and layer <= self._pass[-1][0]:
            self._follows[self._pass[-1][0]] = layer
            self._pass = []
        self._pass = [*self._pass[-3:], (layer, chosen)]
        following = layer + 1 if layer + 1 < len(self._layers) else self._follows.get(layer)
        if following is None or not chosen:
            return
        if likely_E is None and self._table is not None:
            earlier = [experts for _, experts in self._pass] if following > layer else []
            few = all(len(experts) <= MOST_CONTEXTS for experts in earlier)
            likely_E = self._table.scores(following, earlier if few else [])
        if likely_E is None:
            return
        best = [(following, e) for e in np.argsort(-likely_E, kind="stable")[: len(chosen)].tolist()]
        with self._changed:
            self._guess = following, frozenset(best)
            self._ahead.extend(key for key in best if key not in self._cache)
            if self._ahead:
                self._changed.notify_all()

    def _work(self) -> None:
        scratch = memoryview(mmap.mmap(-1, max(layer.stride for layer in self._store.layers)))
        while True:
            with self._changed:
                while (key := self._next()) is None:
                    if self._closed:
                        return
                    self._changed.wait()
            error = None
            try:
                self._read(key, scratch)
            except OSError as raised:
                error = raised
            with self._changed:
                ahead, size = self._reading.pop(key), self._size(key)
                self.counts.read += size
                self.counts.ahead += size if ahead else 0
                if error is None:
                    self._ready.add(key)
                else:
                    self._leave(key)
                    self._failed = error if key in self._pinned else self._failed
                self._changed.notify_all()

    def _leave(self, key: Key) -> None:
        """What was to be read is not."""
        self._cache.drop(key)
        self._fresh.discard(key)
        self.memory.empty(*key)

    def _next(self) -> Key | None:
        """What a thread is to read, of which it is noted that it is being read."""
        if self._demand:
            key = self._demand.popleft()
            self._reading[key] = False
            return key
        while self._ahead and sum(self._reading.values()) < AHEAD and not self._closed:
            key = self._ahead.popleft()
            room = self._reserved + self._size(key) <= self.budget
            if room and key not in self._cache and self._take_in(key):
                self._reading[key] = True
                self._fresh.add(key)
                return key
        return None

    def _read(self, key: Key, scratch: memoryview) -> None:
        layer, expert = key
        there, here = self._store.layers[layer], self._layers[layer]
        place = self.memory.place(layer, expert)
        form = there.forms[expert]
        rounds = not FORMS[form] and self._kept not in (form, "float32")
        if there.record(expert) == here.record(expert) and there.turned == here.turned and not rounds:
            self._store.read(layer, expert, place)
            return
        self._store.read(layer, expert, scratch)
        source, target = np.frombuffer(scratch, np.uint8), np.frombuffer(place, np.uint8)
        for part in there.record(expert).parts:
            value, mine = part.of(source), here.record(expert).part(part.name)
            if not FORMS[form]:
                value = value.T if there.turned != here.turned else value
                value = value.astype(numpy_type(self._kept))
            mine.of(target)[...] = value


def in_memory(layers: Sequence[Layer], dtype: str, turned: bool) -> list[Layer]:
    """A store's layers as a program of decoding reads them."""
    return [dataclasses.replace(layer.as_form(dtype), turned=turned) for layer in layers]
