"""Tables of names: which of a family's tensors holds which of our parameters. Read both ways.

A line of a table (`Entry`) pairs a pattern of their names with a parameter of ours. ``{n}`` stands for a block's number in its
stack and ``{e}`` for an expert's. Our side is said without the place in the scanned tree, ``encoder/self/query``, which
`moves` works out: each move pairs a (part of a) tensor of theirs with a part of an array of ours, so that neither side is
ever whole in memory.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from switchmoe.settings import Settings
from switchmoe.training.places import names, places

# How a tensor of theirs lies, where ours is [inputs..., outputs...]
SAME = "same"  # as ours
FLAT = "flat"  # one axis
LINEAR = "linear"  # [outputs, inputs], as torch has them
KERNEL = "kernel"  # [inputs, outputs], or as ours


class Entry(NamedTuple):
    theirs: str
    ours: str
    form: str = LINEAR
    part: int = 0  # which of ``parts`` equal shares of their outputs
    parts: int = 1


class Family(NamedTuple):
    """What a family of models calls its tensors.

    ``entries``: where several have the same parameter of ours, the first is what is written, and any is read.
    ``copies``: of names that files may have beside the tensor that they are copies of, the parameter of ours that it holds.
    ``unused``: what files may have that no model reads.
    """

    name: str
    entries: tuple[Entry, ...]
    copies: Mapping[str, str] = {}
    unused: tuple[str, ...] = ()


class Move(NamedTuple):
    """A part of a tensor of theirs, and the part of an array of ours that it is."""

    theirs: str
    lead: tuple[int, ...]  # of theirs, the first axes' places: an expert, where a tensor holds all
    entry: Entry
    ours: str
    index: tuple[int, ...]  # of ours, the first axes' places: layer, expert
    shape: tuple[int, ...]  # of our part
    experts: int  # along the axis that ``lead`` is in; 0 without

    @property
    def inputs(self) -> int:
        """How many of our part's axes are a product's inputs."""
        return 2 if self.ours.endswith("/out") else 1

    def whole(self) -> tuple[int, ...]:
        """The shape of their tensor."""
        ins, outs = math.prod(self.shape[: self.inputs]), math.prod(self.shape[self.inputs :])
        form = self.entry.form
        shapes = {
            SAME: self.shape,
            FLAT: (math.prod(self.shape),),
            LINEAR: (outs * self.entry.parts, ins),
            KERNEL: (ins, outs),
        }
        return (*((self.experts,) if self.lead else ()), *shapes[form])

    def accepts(self, shape: tuple[int, ...]) -> bool:
        if shape == self.whole():
            return True
        return self.entry.form == KERNEL and shape == (*self.whole()[: len(self.lead)], *self.shape)

    def rows(self) -> slice:
        """Of their tensor behind ``lead``, the share that is ours."""
        if self.entry.parts == 1:
            return slice(None)
        size = math.prod(self.shape[self.inputs :])
        return slice(self.entry.part * size, (self.entry.part + 1) * size)


class TableError(ValueError):
    """Names or shapes that the table does not have; one line."""


def moves(
    family: Family, settings: Settings, there: Mapping[str, tuple[int, ...]] | None = None
) -> list[Move]:
    """What fills every parameter of ours once.

    Args:
      there: shapes of the tensors that a source has, each of which is to be claimed; None: nothing is read, and the first
        names are to be written.

    Raises:
      TableError: a parameter of ours that the family does not have; a tensor that is missing, unknown or of another shape.
    """
    found = [
        move
        for name, shape in names(settings).items()
        for move in _moves(family, settings, name, shape, there)
    ]
    if there is None:
        return found
    claimed = {move.theirs for move in found}
    for name in there:
        if name not in claimed and name not in family.copies and not _matches(name, family.unused):
            raise TableError(
                f"tensor {name}: found with shape {there[name]}, expected are {len(claimed)} tensors of {family.name}, such as"
                f" {min(claimed)}"
            )
    for move in found:
        if not move.accepts(there[move.theirs]):
            raise TableError(
                f"tensor {move.theirs}: found with shape {there[move.theirs]}, expected {move.whole()}"
            )
    for copy, of in copies(family, found, there).items():
        if there[copy] != there[of]:
            raise TableError(
                f"tensor {copy}: found with shape {there[copy]}, expected that of {of}, {there[of]}"
            )
    return found


def copies(family: Family, found: Iterable[Move], there: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The tensors that are there beside those of which they are copies, by name."""
    claimed = {move.ours: move.theirs for move in found}
    return {
        copy: claimed[ours]
        for copy, ours in family.copies.items()
        if copy in there and copy not in claimed.values()
    }


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern fits, in which ``*`` stands for a number."""
    return any(
        len(name.split(".")) == len(pattern.split("."))
        and all(
            b in (a, "*") and (b != "*" or a.isdecimal())
            for a, b in zip(name.split("."), pattern.split("."), strict=True)
        )
        for pattern in patterns
    )


def _moves(
    family: Family,
    settings: Settings,
    name: str,
    shape: tuple[int, ...],
    there: Mapping[str, tuple[int, ...]] | None,
) -> Iterator[Move]:
    """Those of one parameter."""
    for key, number, index in places(settings, name):
        entries = [entry for entry in family.entries if entry.ours == key]
        if not entries:
            raise TableError(f"parameter {name}: {family.name} has nothing of its kind ({key})")
        experts = shape[len(index)] if "experts" in name.split("/") else 0
        for expert in range(experts) if experts else (None,):
            candidates = [entry.theirs.format(n=number, e=expert) for entry in entries]
            chosen = next(
                (i for i, theirs in enumerate(candidates) if there is None or theirs in there), None
            )
            part = index if expert is None else (*index, expert)
            if chosen is None:
                lead = (expert,) if expert is not None and "{e}" not in entries[0].theirs else ()
                wanted = Move(candidates[0], lead, entries[0], name, part, shape[len(part) :], experts)
                raise TableError(f"tensor {candidates[0]}: not found, expected with shape {wanted.whole()}")
            entry = entries[chosen]
            lead = (expert,) if expert is not None and "{e}" not in entry.theirs else ()
            yield Move(candidates[chosen], lead, entry, name, part, shape[len(part) :], experts)
