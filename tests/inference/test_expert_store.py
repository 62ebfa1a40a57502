"""The store: what is written is read back, by every way; what is damaged, gone or unfinished is named and not used."""

import errno
import json
import mmap
import os
import subprocess

import numpy as np
import pytest

from switchmoe.inference.offload.layout import PAGE, Layer
from switchmoe.inference.offload.memory import Memory
from switchmoe.inference.offload.runtime import Pager
from switchmoe.inference.offload.store import INDEX, WAYS, Store, StoreError, Writer, begun

KERNELS = (("wi", (32, 48)), ("wo", (48, 32)))
LAYERS = [
    Layer("encoder/1", KERNELS, ("float32",) * 3, turned=True),
    Layer("decoder/1", KERNELS, ("int8", "int4", "bfloat16"), (("int8", 0), ("int4", 16))),
]


def values(record, seed):
    rng = np.random.default_rng(seed)
    raw = rng.integers(1, 100, record.size).astype(np.uint8)
    return {part.name: part.of(raw).copy() for part in record.parts}


@pytest.fixture
def written(tmp_path):
    directory = tmp_path / "experts"
    directory.mkdir()
    writer = Writer(directory, LAYERS)
    for number, layer in enumerate(LAYERS):
        for expert in range(3):
            writer.write(number, expert, values(layer.record(expert), 10 * number + expert))
    assert not (directory / INDEX).exists()
    writer.finish({"step": "1"})
    return directory


def read(store, layer, expert):
    record = store.layers[layer].record(expert)
    buffer = memoryview(mmap.mmap(-1, record.size))
    store.read(layer, expert, buffer)
    raw = np.frombuffer(buffer, np.uint8)
    return {part.name: part.of(raw) for part in record.parts}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_written_is_read_and_lies_in_pages(written, way):
    store = Store(written, way)
    assert store.layers == LAYERS and store.of == {"step": "1"}
    for number, layer in enumerate(LAYERS):
        for expert in range(3):
            found, wanted = read(store, number, expert), values(layer.record(expert), 10 * number + expert)
            assert all((found[name].view(np.uint8) == wanted[name].view(np.uint8)).all() for name in wanted)
            assert store.place(number, expert)[0] % PAGE == 0 == store.place(number, expert)[1] % PAGE
    sizes = [[layer.record(e).size // PAGE for e in range(3)] for layer in LAYERS]
    assert sizes == [[3, 3, 3], [1, 1, 2]]  # float32; int8, int4 and bfloat16


@pytest.mark.parametrize("way", WAYS)
def test_a_flipped_byte_is_named_and_only_that_expert_is_refused(written, way):
    store = Store(written, way)
    start, _ = store.place(1, 2)
    with (written / "decoder.1.experts").open("r+b") as file:
        file.seek(start + 100)
        (old,) = file.read(1)
        file.seek(start + 100)
        file.write(bytes([old ^ 1]))
    with pytest.raises(
        StoreError, match=r"expert 2 of decoder/1 in .*decoder\.1\.experts is damaged: .*checksum"
    ):
        read(store, 1, 2)
    read(store, 1, 1)


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_ends_early_is_named(written, way):
    store = Store(written, way)
    os.truncate(written / "encoder.1.experts", store.place(0, 2)[0] + 100)
    with pytest.raises(
        StoreError, match="expert 2 of encoder/1 in .* is damaged: the file ends after 100 of its"
    ):
        read(store, 0, 2)
    with pytest.raises(StoreError, match=r"encoder\.1\.experts is damaged: it has .* bytes instead of"):
        Store(written, way)


def test_a_head_an_index_or_a_file_that_is_damaged_or_gone(written):
    path = written / "encoder.1.experts"
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"turned": true', b'"turned":false', 1))
    with pytest.raises(StoreError, match=r"encoder\.1\.experts is damaged: its head is not what was written"):
        Store(written)
    path.unlink()
    with pytest.raises(StoreError, match=r"encoder\.1\.experts: No such file"):
        Store(written)
    path.write_bytes(raw)
    index = json.loads((written / INDEX).read_text())
    (written / INDEX).write_text(json.dumps(index | {"of": "1"}))
    with pytest.raises(StoreError, match="index.json is damaged: what its experts are of is no object"):
        Store(written)
    index["layers"][1]["sums"].pop()
    (written / INDEX).write_text(json.dumps(index))
    with pytest.raises(
        StoreError, match="index.json is damaged: it has 2 checksums of decoder/1's 3 experts"
    ):
        Store(written)
    (written / INDEX).write_text("{}")
    with pytest.raises(StoreError, match="index.json is damaged"):
        Store(written)
    (written / INDEX).unlink()
    with pytest.raises(StoreError, match="index.json is not there: the experts' files are unfinished"):
        Store(written)


def test_a_full_disk_is_said_before_anything_is_written_and_is_left_as_it_was(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk")
    try:
        with pytest.raises(
            StoreError, match=r"decoder\.1\.experts can't be written: No space left .* the experts take"
        ):
            Writer(place, LAYERS)
        assert not list(place.iterdir())
    finally:
        subprocess.run(["umount", place], check=True)


def test_an_unfinished_store_goes_on_only_where_nothing_of_it_is_lost(tmp_path):
    assert not begun(tmp_path, LAYERS)
    Writer(tmp_path, LAYERS).close()
    path = tmp_path / "decoder.1.experts"
    good = path.read_bytes()
    for raw in (good[:-PAGE], bytes(len(good)), None):
        assert begun(tmp_path, LAYERS)
        path.unlink() if raw is None else path.write_bytes(raw)
        assert not begun(tmp_path, LAYERS)
        path.write_bytes(good)


def test_a_disk_that_fails_takes_nothing_of_an_earlier_process(tmp_path, monkeypatch):
    writer = Writer(tmp_path, LAYERS)
    writer.write(0, 0, values(LAYERS[0].record(0), 0))
    writer.close()
    (tmp_path / "decoder.1.experts").unlink()
    (before,) = [path.read_bytes() for path in tmp_path.iterdir()]

    def full(file, start, size):
        if not os.fstat(file).st_size:  # one that is new
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StoreError, match=r"decoder\.1\.experts can't be written: No space left"):
        Writer(tmp_path, LAYERS)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


def test_bytes_go_to_an_expert_of_the_same_size_and_back_to_the_system_for_another():
    memory = Memory(LAYERS)
    bytes_of = lambda layer, expert: bytes(memory.place(layer, expert))  # noqa: E731
    for layer, expert in ((0, 0), (1, 2)):  # three pages and two
        memory.place(layer, expert)[:] = b"\x05" * len(memory.place(layer, expert))
    memory.move((0, 0), (0, 1))
    memory.move((1, 2), (0, 2))
    assert bytes_of(0, 1) == b"\x05" * 3 * PAGE
    assert not any(bytes_of(0, 0) + bytes_of(0, 2) + bytes_of(1, 2))


def test_experts_of_unequal_sizes_take_each_others_room(written):
    """In three pages: two of one page leave for one of three, and it for one of two."""
    store = Store(written)
    pager = Pager(store, LAYERS, "float32", 3 * PAGE)
    for layer, experts in ((1, [0, 1]), (0, [2]), (1, [2, 0]), (0, [0]), (1, [1, 0])):
        pager(layer, np.isin(np.arange(3), experts))
        pager.check()
        held = [(n, e) for n in range(2) for e in range(3) if any(pager.memory.place(n, e))]
        assert held == [(layer, expert) for expert in sorted(experts)]
        for expert in experts:
            record = LAYERS[layer].record(expert)
            found, wanted = (
                np.frombuffer(pager.memory.place(layer, expert), np.uint8),
                read(store, layer, expert),
            )
            assert all((record.part(name).of(found) == wanted[name]).all() for name in wanted)
    assert pager.counts.hits == 0 and pager.counts.misses == 8
    pager.close()


def test_a_part_of_another_shape_is_refused(tmp_path):
    writer = Writer(tmp_path, LAYERS)
    with pytest.raises(ValueError, match=r"wi of shape \(2, 2\): accepted is \(48, 32\), float32"):
        writer.write(0, 0, {"wi": np.zeros((2, 2), np.float32)})
    writer.close()
