"""What is asked of a piece of text: the arrays of a batch, by the objective's name (`data.objective`).

Letters: B pieces, L raw length.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from switchmoe.data import span_corruption
from switchmoe.data.errors import DataError
from switchmoe.settings import DataSettings


class Lengths(NamedTuple):
    """Tokens of a sequence."""

    raw: int  # of a piece of text
    targets: int  # that the decoder gets
    real: int  # of all stacks, without padding
    inputs: int = 0  # that the encoder gets


class TextObjective(NamedTuple):
    """Three functions of the settings.

    ``lengths(settings)`` gives `Lengths`. ``draws(rows, settings, rng)`` makes what is random, a row for each piece of a
    global batch, none of which depends on how many come after it: a process takes its own. ``example(tokens_BL, draws,
    settings, vocabulary)`` makes the arrays, int32: ``inputs`` and ``targets``, each row ended by EOS and then padded with
    0 to their lengths; or for a decoder alone ``targets``, ``segments`` and ``positions``.
    """

    lengths: Callable[[DataSettings], Lengths]
    draws: Callable[[int, DataSettings, np.random.Generator], np.ndarray]
    example: Callable[[np.ndarray, np.ndarray, DataSettings, Any], dict[str, np.ndarray]]
    ends: bool = False  # whether each document of the text ends with EOS before pieces are cut


def lengths(settings: DataSettings) -> Lengths:
    """Those of the settings' objective.

    Raises:
      DataError: `data.target_length` is too small; ValueError as `span_corruption.lengths`.
    """
    return OBJECTIVES[settings.objective].lengths(settings)


def _span_lengths(settings: DataSettings) -> Lengths:
    raw, written = span_corruption.lengths(
        settings.input_length, settings.noise_density, settings.mean_span_length
    )
    if 0 < settings.target_length < written:
        raise DataError(
            f"data.target_length={settings.target_length}: span corruption of data.input_length="
            f"{settings.input_length} writes {written} target tokens; accepted is 0 or an integer >= {written}"
        )
    real = settings.input_length + written
    return Lengths(raw, max(settings.target_length, written), real, settings.input_length)


def _span_draws(rows: int, settings: DataSettings, rng: np.random.Generator) -> np.ndarray:
    raw = _span_lengths(settings).raw
    return span_corruption.noise_mask(rows, raw, rng, settings.noise_density, settings.mean_span_length)


def _span_example(
    tokens_BL: np.ndarray, mask_BL: np.ndarray, settings: DataSettings, vocabulary: Any
) -> dict[str, np.ndarray]:
    inputs, targets = span_corruption.corrupt(tokens_BL, mask_BL, vocabulary)
    padding = _span_lengths(settings).targets - targets.shape[1]
    return {"inputs": inputs, "targets": np.pad(targets, ((0, 0), (0, padding)))}


def _prefix_lengths(settings: DataSettings) -> Lengths:
    """Random: a piece as long as the inputs is cut somewhere. Full: both stacks are filled."""
    if settings.target_length == 1:
        raise DataError(
            "data.target_length=1: accepted with data.objective=prefix_lm is 0 or an integer >= 2"
        )
    inputs = settings.input_length
    targets = settings.target_length or inputs
    if settings.prefix == "full":
        return Lengths(inputs + targets - 2, targets, inputs + targets, inputs)
    return Lengths(inputs, targets, inputs + 2, inputs)


def _prefix_draws(rows: int, settings: DataSettings, rng: np.random.Generator) -> np.ndarray:
    """Tokens of each piece that are its prefix: uniform among those that leave both stacks room for the rest."""
    raw, targets, *_ = _prefix_lengths(settings)
    longest = settings.input_length - 1
    shortest = longest if settings.prefix == "full" else max(1, raw - (targets - 1))
    return rng.integers(shortest, longest, size=rows, endpoint=True)


def _prefix_example(
    tokens_BL: np.ndarray, prefix_B: np.ndarray, settings: DataSettings, vocabulary: Any
) -> dict[str, np.ndarray]:
    targets = _prefix_lengths(settings).targets
    rest_B = tokens_BL.shape[1] - prefix_B
    end, first_B = vocabulary.eos_id, np.zeros_like(prefix_B)
    return {
        "inputs": _ended(tokens_BL, first_B, prefix_B, settings.input_length, end),
        "targets": _ended(tokens_BL, prefix_B, rest_B, targets, end),
    }


def _ended(
    tokens_BL: np.ndarray, first_B: np.ndarray, count_B: np.ndarray, length: int, eos_id: int
) -> np.ndarray:
    """``count`` tokens of each row from ``first`` on, EOS, and 0 up to the length."""
    place_L = np.arange(length)[None]
    from_BL = np.minimum(first_B[:, None] + place_L, tokens_BL.shape[1] - 1)
    found_BL = np.take_along_axis(tokens_BL, from_BL, axis=1)
    end_BL = np.where(place_L == count_B[:, None], eos_id, 0)
    return np.where(place_L < count_B[:, None], found_BL, end_BL).astype(np.int32)


def _causal_lengths(settings: DataSettings) -> Lengths:
    length = settings.target_length or settings.input_length
    return Lengths(length, length, length)


def _no_draws(rows: int, settings: DataSettings, rng: np.random.Generator) -> np.ndarray:
    return np.zeros((rows, 0))


def _causal_example(
    tokens_BL: np.ndarray, _: np.ndarray, settings: DataSettings, vocabulary: Any
) -> dict[str, np.ndarray]:
    """All tokens are targets. What a row has of a document is a segment: numbered from 1, its places from 0."""
    starts_BL = np.zeros(tokens_BL.shape, bool)
    starts_BL[:, 1:] = tokens_BL[:, :-1] == vocabulary.eos_id
    starts_BL[:, :1] = True
    place_L = np.arange(tokens_BL.shape[1])[None]
    first_BL = np.maximum.accumulate(np.where(starts_BL, place_L, 0), axis=1)
    return {
        "targets": tokens_BL.astype(np.int32),
        "segments": starts_BL.cumsum(axis=1, dtype=np.int32),
        "positions": (place_L - first_BL).astype(np.int32),
    }


OBJECTIVES = {
    "span_corruption": TextObjective(_span_lengths, _span_draws, _span_example),
    "prefix_lm": TextObjective(_prefix_lengths, _prefix_draws, _prefix_example),
    "causal_lm": TextObjective(_causal_lengths, _no_draws, _causal_example, ends=True),
}
