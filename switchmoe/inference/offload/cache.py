"""Which experts stay in memory, within so many bytes: `Cache`, which the runtime asks, and `simulate`, which asks it along a trace.

A key is (sparse layer, expert); layers are numbered in the order in which a token meets them. A **pass** is one way through
the layers: it ends where a layer is used that comes before the last one used. Of what may leave, that of the lowest rank does:

- ``lru``: least recently used.
- ``lfu``: fewest uses, of equals the least recently used. Uses are counted from the start, also those of experts that were not
  there (the "perfect" LFU of Breslau et al. 1999).
- ``lfru``: lowest uses / age, where the age is the number of uses of any expert since its own last one, that one included.
  vLLM's expert cache calls LFRU a "frequency-weighted LRU" (vllm-project/vllm#37190); this formula for it is ours.
- ``least_stale``: an expert last used in an earlier pass (stale) goes before those of this pass. Among the stale ones the
  order is that of the layers, the first one first, so those already passed go before those that are still to come; in a layer, and among those of
  this pass, the least recently used. The idea is SpecMD's (Hoang et al. 2026, 2602.03921); of the stale ones' order and of ties we know
  no exact statement, so they are ours. With a single layer all are of one pass, which is ``lru``.
- ``belady`` (`simulate` alone, as it knows the future): the expert whose next use is farthest leaves, or does not come in
  at all (Belady 1966, MIN with bypass). For experts of equal size no policy has more hits; for others it is a policy like any.

An expert that is read ahead counts as used recently when it comes in, and not as a use.

Letters: V visits, M accesses, L layers.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np

Key = tuple[int, int]  # (sparse layer, in the order in which a token meets them; expert)
Visit = tuple[int, Sequence[int]]  # a layer and the experts that it needs at once, each once

LATE = 1 << 62  # a rank above all others
LAYER = 1 << 40  # more than there are uses


class _State(NamedTuple):
    """Of the experts that are there: [N] each, and what they are compared with."""

    last_N: np.ndarray  # when it was used last, or came in
    uses_N: np.ndarray
    layer_N: np.ndarray
    now: int
    pass_began: int  # the first use of this pass


def _lru(state: _State) -> np.ndarray:
    return state.last_N.copy()


def _lfu(state: _State) -> np.ndarray:
    return state.uses_N + state.last_N / (state.now + 1)  # float64: a server has any number of uses


def _lfru(state: _State) -> np.ndarray:
    return state.uses_N / (state.now - state.last_N + 1)


def _least_stale(state: _State) -> np.ndarray:
    return (state.last_N >= state.pass_began) * (LATE // 2) + state.layer_N * LAYER + state.last_N


RANKS = {"lru": _lru, "lfu": _lfu, "lfru": _lfru, "least_stale": _least_stale}
POLICIES = tuple(RANKS)
BELADY = "belady"


class Cache:
    """The books of what is there; the bytes themselves are the caller's.

    Args:
      budget: bytes.
      size: of an expert, bytes.
      policy: one of POLICIES.
      layers: how many sparse layers there are.

    Raises:
      ValueError: a policy that is not known, or a budget below 0.
    """

    def __init__(self, budget: int, size: Callable[[Key], int], policy: str, layers: int):
        if policy not in RANKS:
            raise ValueError(f"policy {policy}: accepted is one of {', '.join(POLICIES)}")
        if budget < 0:
            raise ValueError(f"budget of {budget} bytes: accepted is an integer >= 0")
        self.budget, self.held = budget, 0  # bytes
        self._size, self._rank, self._layers = size, RANKS[policy], layers
        self._slot: dict[Key, int] = {}
        self._keys: list[Key] = []  # by slot, as are:
        self._last, self._uses, self._layer = (np.zeros(64, np.int64) for _ in range(3))
        self._count: Counter[Key] = Counter()
        self._now = self._pass_began = self._at = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._slot

    def __len__(self) -> int:
        return len(self._keys)

    def used(self, key: Key) -> bool:
        """A token needs it now; True: it is there."""
        layer = key[0]
        if not 0 <= layer < self._layers:
            raise ValueError(
                f"expert {key[1]} of layer {layer}: accepted is a layer from 0 to {self._layers - 1}"
            )
        self._now += 1
        if layer < self._at:
            self._pass_began = self._now
        self._at = layer
        self._count[key] += 1
        slot = self._slot.get(key)
        if slot is None:
            return False
        self._last[slot] = self._now
        self._uses[slot] += 1
        return True

    def admit(self, key: Key, pinned: Collection[Key] = ()) -> list[Key] | None:
        """Takes it in; what leaves for it, already taken out of the books.

        Args:
          pinned: what may not leave.

        Returns:
          None, and nothing changed, where it is larger than what may be freed.
        """
        if key in self._slot:
            return []
        size = self._size(key)
        leaving = self._leaving(self.held + size - self.budget, pinned)
        if leaving is None:
            return None
        for other in leaving:
            self.drop(other)
        slot = len(self._keys)
        if slot == len(self._last):
            self._last, self._uses, self._layer = (
                np.concatenate([values, np.zeros_like(values)])
                for values in (self._last, self._uses, self._layer)
            )
        self._slot[key] = slot
        self._keys.append(key)
        self._last[slot], self._uses[slot], self._layer[slot] = self._now, self._count[key], key[0]
        self.held += size
        return leaving

    def drop(self, key: Key) -> None:
        """It is no longer there."""
        slot, other = self._slot.pop(key), self._keys.pop()
        self.held -= self._size(key)
        if other != key:  # the last slot's takes its place
            self._slot[other], self._keys[slot] = slot, other
            for values in (self._last, self._uses, self._layer):
                values[slot] = values[len(self._keys)]

    def _leaving(self, excess: int, pinned: Collection[Key]) -> list[Key] | None:
        """Of the lowest ranks, so many that their bytes are the excess; None: there are not enough."""
        if excess <= 0:
            return []
        if excess > self.held:
            return None
        there = slice(len(self._keys))
        state = _State(self._last[there], self._uses[there], self._layer[there], self._now, self._pass_began)
        rank_N = self._rank(state)
        found: list[Key] = []
        for _ in self._keys:
            slot = int(rank_N.argmin())
            rank_N[slot] = LATE
            key = self._keys[slot]
            if key in pinned:
                continue
            found.append(key)
            excess -= self._size(key)
            if excess <= 0:
                return found
        return None


class Hits(NamedTuple):
    """By layer."""

    hits_L: np.ndarray
    accesses_L: np.ndarray
    read: int  # bytes that were not there

    @property
    def rate(self) -> float:
        return float(self.hits_L.sum() / max(1, self.accesses_L.sum()))


def simulate(
    visits: Iterable[Visit], budget: int, size: Callable[[Key], int], policy: str, layers: int
) -> Hits:
    """What a cache, empty at first, would have had of a trace's visits.

    In a visit no expert of its own may leave for another of its own; one that finds no room is read and not kept.

    Args:
      policy: one of POLICIES, or BELADY.

    Raises:
      ValueError: as `Cache`.
    """
    if policy == BELADY:
        return _belady(visits, budget, size, layers)
    cache = Cache(budget, size, policy, layers)
    hits, accesses, read = [0] * layers, [0] * layers, 0
    for layer, experts in visits:
        keys = [(layer, expert) for expert in experts]
        missing = [key for key in keys if not cache.used(key)]
        accesses[layer] += len(keys)
        hits[layer] += len(keys) - len(missing)
        for key in missing:
            read += size(key)
            cache.admit(key, keys)
    return Hits(np.array(hits), np.array(accesses), read)


def _belady(visits: Iterable[Visit], budget: int, size: Callable[[Key], int], layers: int) -> Hits:
    if budget < 0:
        raise ValueError(f"budget of {budget} bytes: accepted is an integer >= 0")
    keys = [(layer, expert) for layer, experts in visits for expert in experts]
    never = len(keys)
    next_M, seen = [never] * never, {}
    for at in range(never - 1, -1, -1):
        next_M[at] = seen.get(keys[at], never)
        seen[keys[at]] = at
    there: dict[Key, int] = {}  # and when it is used next
    farthest: list[tuple[int, Key]] = []  # a heap, with what was true once
    hits, accesses, read, free = [0] * layers, [0] * layers, 0, budget
    for at, key in enumerate(keys):
        accesses[key[0]] += 1
        own = size(key)
        if key in there:
            hits[key[0]] += 1
            free += own
            del there[key]
        else:
            read += own
        if next_M[at] == never or own > budget:
            continue
        while free < own and farthest:
            when, other = farthest[0]
            if there.get(other) == -when:
                if -when <= next_M[at]:
                    break
                free += size(other)
                del there[other]
            heapq.heappop(farthest)
        if free >= own:
            free -= own
            there[key] = next_M[at]
            heapq.heappush(farthest, (-next_M[at], key))
    return Hits(np.array(hits), np.array(accesses), read)
