"""The pager alone: what is read ahead, what waits, what leaves, and what can't be read."""

import threading
import time

import numpy as np
import pytest
from expert_files import asks, until, write
from test_decoding import init, settings

from switchmoe.inference.offload.predict import Table
from switchmoe.inference.offload.runtime import Pager
from switchmoe.inference.offload.store import Store, StoreError

pytestmark = pytest.mark.usefixtures("one_device")


class Slow(Store):
    """A disk that stands still until it is let go on; ``still``: for these experts alone."""

    def __init__(self, directory, *still):
        super().__init__(directory, "pread")
        self.on, self.asked, self._still = threading.Event(), [], still

    def read(self, layer, expert, buffer):
        self.asked.append((layer, expert))
        if not self._still or (layer, expert) in self._still:
            self.on.wait(10)
        super().read(layer, expert, buffer)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("files") / "experts"
    of = settings(model=dict(num_layers=2), num_experts=20)
    return directory, write(of, init(of), directory)


def bytes_of(pager, layer, expert):
    return bytes(pager.memory.place(layer, expert))


def bytes_of_right(files, layer, expert):
    pager = made(files, 40)
    pager(layer, asks(expert))
    return bytes_of(pager, layer, expert)


def made(files, experts, store=None, **how):
    directory, layers = files
    return Pager(store or Store(directory), layers, "float32", experts * layers[0].record(0).size, **how)


def test_an_expert_that_leaves_gives_its_bytes_to_the_one_that_comes(files):
    pager, right = made(files, 2), made(files, 40)
    for layer, expert in ((0, 3), (0, 4), (1, 5), (0, 3), (1, 4), (1, 5)):
        pager(layer, asks(expert))
        right(layer, asks(expert))
        assert bytes_of(pager, layer, expert) == bytes_of(right, layer, expert)
    pager.check()
    assert (pager.counts.hits, pager.counts.misses) == (0, 6) and (
        right.counts.hits,
        right.counts.misses,
    ) == (2, 4)
    held = [bytes_of(pager, layer, e) for layer in (0, 1) for e in range(20)]
    assert sum(any(record) for record in held) <= 2  # behind the others' addresses there is nothing


def test_what_is_foreseen_is_read_ahead(files):
    pager = made(files, 4)
    pager(0, asks(1), None, np.eye(20)[7])
    until(lambda: (1, 7) in pager._ready)
    before = pager.counts.misses
    pager(1, asks(7))
    assert pager.counts.misses == before and pager.counts.useful == pager.counts.ahead > 0
    assert (pager.counts.guessed, pager.counts.right) == (1, 1)


def test_what_a_layer_asks_for_does_not_wait_for_what_was_foreseen(files):
    store = Slow(files[0], (1, 5), (1, 6))
    pager = made(files, 4, store)
    pager(0, asks(1, 2), None, np.eye(20)[5] * 2 + np.eye(20)[6])  # two are foreseen; one is begun
    until(lambda: store.asked[-1] == (1, 5))
    pager(1, asks(9))
    assert not store.on.is_set() and (1, 5) in pager._reading  # the disk has not given the other one yet
    assert bytes_of(pager, 1, 9) == bytes_of_right(files, 1, 9)
    store.on.set()
    until(lambda: not pager._reading)
    pager.check()
    assert (1, 6) not in store.asked  # forgotten
    assert (pager.counts.guessed, pager.counts.right) == (2, 0)


@pytest.mark.parametrize("room, ahead", [(2, False), (3, True)])
def test_what_is_read_ahead_leaves_the_room_that_a_layer_may_need(files, room, ahead):
    """A budget of one layer's need: an expert that comes slowly and was only foreseen would have the place of one that is asked for."""
    store = Slow(files[0], (1, 5))
    pager = made(files, room, store, patience=5.0)
    pager.holds(2)
    pager(0, asks(1), None, np.eye(20)[5])
    until(lambda: not pager._ahead)
    began = time.monotonic()
    pager(1, asks(8, 9))
    pager.check()
    assert time.monotonic() - began < 4 and ((1, 5) in pager._reading) == ahead
    assert (pager.counts.guessed, pager.counts.right) == (1, 0)
    store.on.set()


def test_a_table_foresees(files):
    chosen = np.array([[[e], [(e + 1) % 20]] for e in range(20)] * 5)
    pager = made(files, 40, table=Table.learn(chosen, 20))
    pager(0, asks(3))
    until(lambda: (1, 4) in pager._ready)
    pager(1, asks(4))
    assert pager.counts.hits == 1 and pager.counts.useful > 0


def test_a_disk_that_is_slow_is_one_line_and_nothing_is_used(files):
    store = Slow(files[0])
    pager = made(files, 4, store, patience=0.1)
    began = time.monotonic()
    pager(0, asks(1))
    pager(0, asks(2))  # the program goes on to its end at once
    assert time.monotonic() - began < 5
    with pytest.raises(
        StoreError, match=r"expert 1 of encoder/1 in .* was not read within 0.1 s: the disk is slow, or gone"
    ):
        pager.check()
    store.on.set()
    pager(0, asks(2))
    pager.check()  # what is whole again works


class Broken(Slow):
    """A disk of which one expert is damaged, and others are when it is let go on."""

    def read(self, layer, expert, buffer):
        while expert == 1 and len(self.asked) < 2:
            time.sleep(0.001)
        if expert > 1:
            super().read(layer, expert, buffer)
        if expert < 5:
            raise StoreError(f"expert {expert} is damaged")


def test_what_a_failed_program_waited_for_is_nothing_to_the_next_one(files):
    store = Broken(files[0])
    pager = made(files, 8, store)
    pager(0, asks(1, 2, 3, 4, 5, 6))  # three readers: 5 and 6 are not begun
    with pytest.raises(StoreError, match="expert 1 is damaged"):
        pager.check()
    store.on.set()
    until(lambda: not pager._reading)
    pager.check()  # 2 and 3 turned out to be damaged too
    assert {(0, 2), (0, 3)} <= set(store.asked) <= {(0, 2), (0, 3), (0, 4)}
    pager(0, asks(5, 7))
    pager.check()
    assert bytes_of(pager, 0, 5) == bytes_of_right(files, 0, 5) and len(pager._cache) == 2
    with pytest.raises(StoreError, match="expert 2 is damaged"):  # asked for again, it is told again
        pager(0, asks(2))
        pager.check()
