"""Span corruption (T5, 3.1.4) on token ids, in NumPy.

A raw piece of L tokens is cut into alternating spans, non-noise first. The inputs have a sentinel in
place of each noise span, the targets one in place of each non-noise span; both end with EOS:

    raw      Thank you for inviting me to your party last week
    inputs   Thank you <0> me to your party <1> week </s>
    targets  <0> for inviting <1> last </s>

Lengths are fixed: for L raw tokens, ``noise = round(L * density)`` and ``spans = round(noise / mean)``
(each at least 1), so inputs have ``L - noise + spans + 1`` tokens and targets ``noise + spans + 1``.

Letters: L raw length, S spans.
"""

from typing import Protocol

import numpy as np

from switchmoe.settings import NUM_SENTINELS


class Sentinels(Protocol):
    """What is needed of a vocabulary."""

    eos_id: int
    size: int

    def sentinel(self, index: int) -> int: ...


def noise_and_spans(raw_length: int, noise_density: float, mean_span_length: float) -> tuple[int, int]:
    """How many tokens of a raw piece are noise, and in how many spans.

    Raises:
      ValueError: more spans than sentinels, or than non-noise tokens to keep them apart.
    """
    noise, spans = _counts(raw_length, noise_density, mean_span_length)
    given = f"data.noise_density={noise_density}, data.mean_span_length={mean_span_length}"
    if spans > NUM_SENTINELS:
        raise ValueError(
            f"{given}: {spans} spans in {raw_length} tokens, but there are {NUM_SENTINELS} sentinels; "
            "accepted is a smaller data.input_length or data.noise_density, or a larger data.mean_span_length"
        )
    if spans > raw_length - noise:
        raise ValueError(
            f"{given}: {spans} spans of noise need as many tokens between them, but "
            f"{raw_length - noise} of {raw_length} are left; accepted is a smaller data.noise_density or a larger data.mean_span_length"
        )
    return noise, spans


def lengths(input_length: int, noise_density: float = 0.15, mean_span_length: float = 3.0) -> tuple[int, int]:
    """The largest raw length whose corrupted inputs, EOS included, have ``input_length`` tokens.

    One more raw token never adds more than one input token, so that every ``input_length`` from 3 up
    is met exactly. T5's 512 gives (568, 114).

    Returns:
      raw length, target length: in tokens, the latter with sentinels and EOS.

    Raises:
      ValueError: as ``noise_and_spans``, or ``input_length`` below 3.
    """
    if input_length < 3:
        raise ValueError(f"data.input_length={input_length}: accepted is an integer >= 3")

    def corrupted(raw_length: int) -> tuple[int, int]:
        noise, spans = _counts(raw_length, noise_density, mean_span_length)
        return raw_length - noise + spans + 1, noise + spans + 1

    raw_length = input_length - 1
    while corrupted(raw_length + 1)[0] <= input_length:
        raw_length += 1
    noise_and_spans(raw_length, noise_density, mean_span_length)
    inputs, targets = corrupted(raw_length)
    assert inputs == input_length, (inputs, input_length)
    return raw_length, targets


def noise_mask(
    raw_length: int, rng: np.random.Generator, noise_density: float = 0.15, mean_span_length: float = 3.0
) -> np.ndarray:
    """T5's `random_spans_noise_mask`: bool [L], True where a token is noise.

    Noise and non-noise tokens are each cut into S non-empty spans, uniformly over all such cuts, and
    interleaved, non-noise first.
    """
    noise, spans = noise_and_spans(raw_length, noise_density, mean_span_length)

    def cut(length: int) -> np.ndarray:
        ends_S = np.sort(rng.choice(length - 1, spans - 1, replace=False)) + 1
        return np.diff(ends_S, prepend=0, append=length)

    runs = np.stack([cut(raw_length - noise), cut(noise)], axis=1).reshape(-1)
    return np.repeat(np.tile([False, True], spans), runs)


def corrupt(
    tokens_L: np.ndarray,
    rng: np.random.Generator,
    vocabulary: Sentinels,
    noise_density: float = 0.15,
    mean_span_length: float = 3.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Corrupts one raw piece of at least 2 tokens.

    Returns:
      inputs, targets: int32, with the lengths of the module's docstring.

    Raises:
      ValueError: as ``noise_and_spans``.
    """
    mask_L = noise_mask(len(tokens_L), rng, noise_density, mean_span_length)
    return _replace(tokens_L, mask_L, vocabulary), _replace(tokens_L, ~mask_L, vocabulary)


def restore(inputs: np.ndarray, targets: np.ndarray, vocabulary: Sentinels) -> np.ndarray:
    """Puts the targets' spans in place of the inputs' sentinels: the raw tokens, int32.

    What follows EOS is ignored. A sentinel that the targets lack stays as it is, so that a model's
    own targets can be put in as well.
    """
    first = vocabulary.sentinel(0)
    last = vocabulary.sentinel(NUM_SENTINELS - 1)
    spans: dict[int, list[int]] = {}
    open_span: list[int] = []
    for token in _until_eos(targets, vocabulary):
        if last <= token <= first:
            open_span = spans.setdefault(token, [])
        else:
            open_span.append(token)
    filled = [spans.get(token, [token]) for token in _until_eos(inputs, vocabulary)]
    return np.array([token for span in filled for token in span], np.int32)


def _counts(raw_length: int, noise_density: float, mean_span_length: float) -> tuple[int, int]:
    noise = min(max(round(raw_length * noise_density), 1), raw_length - 1)
    return noise, max(round(noise / mean_span_length), 1)


def _replace(tokens_L: np.ndarray, mask_L: np.ndarray, vocabulary: Sentinels) -> np.ndarray:
    """A sentinel for each run of True, the other tokens as they are, EOS."""
    starts_L = mask_L & ~np.concatenate([[False], mask_L[:-1]])
    sentinels_L = vocabulary.sentinel(0) + 1 - np.cumsum(starts_L)
    kept = np.where(starts_L, sentinels_L, tokens_L)[~mask_L | starts_L]
    return np.append(kept, vocabulary.eos_id).astype(np.int32)


def _until_eos(tokens: np.ndarray, vocabulary: Sentinels) -> list[int]:
    ids = [int(token) for token in tokens]
    return ids[: ids.index(vocabulary.eos_id)] if vocabulary.eos_id in ids else ids
