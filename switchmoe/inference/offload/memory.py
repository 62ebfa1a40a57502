"""The memory in which experts lie: an address for every expert of a layer, and bytes behind those that are at hand.

So a program reads an expert where it would read it with all of them in memory, and what comes in is copied nowhere. The pages
of an expert that leaves are moved to the address of the one that comes in its place (Linux's mremap), which costs some
microseconds; a fresh page costs more than to read it (here 64 MiB: 75 ms to touch anew, 11 to fill again).
"""

import ctypes
import mmap
import os

import numpy as np

from switchmoe.inference.offload.layout import Layer

_MOVE = 1 | 2 | 4  # MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP
_NORESERVE = 0x4000
_libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
if hasattr(_libc, "mremap"):  # Linux's
    _libc.mremap.restype = ctypes.c_void_p
    _libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]


class Memory:
    """Of each layer E places of ``layer.stride`` bytes, empty at first."""

    def __init__(self, layers: list[Layer]):
        self._layers = layers
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
        self._maps = [mmap.mmap(-1, layer.stride * len(layer.forms), flags=flags) for layer in layers]
        self._starts = [ctypes.addressof(ctypes.c_char.from_buffer(found)) for found in self._maps]

    def array(self, layer: int) -> np.ndarray:
        """uint8 [E, stride], of all experts, at hand or not."""
        return np.frombuffer(self._maps[layer], np.uint8).reshape(-1, self._layers[layer].stride)

    def place(self, layer: int, expert: int) -> memoryview:
        start = expert * self._layers[layer].stride
        return memoryview(self._maps[layer])[start : start + self._layers[layer].record(expert).size]

    def empty(self, layer: int, expert: int) -> None:
        """Gives an expert's bytes back."""
        found = self._layers[layer]
        self._maps[layer].madvise(mmap.MADV_DONTNEED, expert * found.stride, found.record(expert).size)

    def move(self, old: tuple[int, int], new: tuple[int, int]) -> None:
        """Puts the bytes of one that leaves behind the address of another; both as (layer, expert)."""
        sizes = [self._layers[layer].record(expert).size for layer, expert in (old, new)]
        if sizes[0] == sizes[1]:
            source, target = (
                self._starts[layer] + expert * self._layers[layer].stride for layer, expert in (old, new)
            )
            if _libc.mremap(source, sizes[0], sizes[0], _MOVE, target) == target:
                return
        self.empty(*old)  # the other's are taken as they are filled


def give_back() -> None:
    """Gives the system what the C library keeps of freed memory, such as a compilation's: room for experts under a limit."""
    if hasattr(_libc, "malloc_trim"):  # glibc's
        _libc.malloc_trim(0)


def available() -> bool:
    """Whether this system has what is needed."""
    return hasattr(mmap, "MADV_DONTNEED") and hasattr(os, "preadv") and hasattr(_libc, "mremap")
