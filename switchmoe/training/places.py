"""Our parameters by name, and which block of a stack each part of them is of."""

from collections.abc import Iterator

from flax.traverse_util import flatten_dict

from switchmoe.settings import Settings
from switchmoe.training import train_state


def names(settings: Settings) -> dict[str, tuple[int, ...]]:
    """Shapes of our parameters, by name."""
    shapes = flatten_dict(train_state.parameter_shapes(settings), sep="/")
    return {name: tuple(leaf.shape) for name, leaf in shapes.items()}


def places(settings: Settings, name: str) -> Iterator[tuple[str, int | None, tuple[int, ...]]]:
    """(the table's name, a block's number in its stack, the layer's place in the array) of each block that a parameter is of."""
    stack, _, rest = name.partition("/")
    group, _, inner = rest.partition("/")
    if group.startswith("first_"):
        yield f"{stack}/{inner}", int(group.removeprefix("first_")), ()
    elif group.startswith("blocks"):
        block, _, inner = inner.partition("/")
        offset = settings.first(stack) + int(block.removeprefix("block_"))
        period = settings.period(stack)
        repeats = (
            range(settings.repeats(stack)) if group == "blocks" else [int(group.removeprefix("blocks_"))]
        )
        for i in repeats:
            yield f"{stack}/{inner}", offset + i * period, (i,) if group == "blocks" else ()
    else:
        yield name, None, ()
