"""Span corruption (T5, 3.1.4) on token ids, in NumPy.

A raw piece of L tokens is cut into alternating spans, non-noise first. The inputs have a sentinel in
place of each noise span, the targets one in place of each non-noise span; both end with EOS:

    raw      Thank you for inviting me to your party last week
    inputs   Thank you <0> me to your party <1> week </s>
    targets  <0> for inviting <1> last </s>

Lengths are fixed: for L raw tokens, ``noise = round(L * density)`` and ``spans = round(noise / mean)``
(each at least 1), so inputs have ``L - noise + spans + 1`` tokens and targets ``noise + spans + 1``.

Letters: B pieces, L raw length, S spans, N places for a cut.
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
    rows: int,
    raw_length: int,
    rng: np.random.Generator,
    noise_density: float = 0.15,
    mean_span_length: float = 3.0,
) -> np.ndarray:
    """T5's `random_spans_noise_mask` for so many pieces: bool [B, L], True where a token is noise.

    Noise and non-noise tokens are each cut into S non-empty spans, uniformly over all such cuts, and
    interleaved, non-noise first. A row does not depend on how many come after it.

    Raises:
      ValueError: as ``noise_and_spans``.
    """
    noise, spans = noise_and_spans(raw_length, noise_density, mean_span_length)
    # One draw for each place where a cut may be, of both kinds: the places of the least draws are cut.
    draws_BL = rng.random((rows, raw_length - 2), np.float32)

    def cut(draws_BN: np.ndarray) -> np.ndarray:
        ends_BS = np.sort(np.argsort(draws_BN, axis=1)[:, : spans - 1], axis=1) + 1
        return np.diff(ends_BS, prepend=0, append=draws_BN.shape[1] + 1, axis=1)

    kept = raw_length - noise
    lengths_BS2 = np.stack([cut(draws_BL[:, : kept - 1]), cut(draws_BL[:, kept - 1 :])], axis=2)
    ends_BS = lengths_BS2.reshape(rows, -1).cumsum(axis=1)
    turns_BL = np.zeros((rows, raw_length), np.int8)
    np.put_along_axis(turns_BL, ends_BS[:, :-1], 1, axis=1)
    return turns_BL.cumsum(axis=1, dtype=np.int32) % 2 == 1


def corrupt(
    tokens_BL: np.ndarray, mask_BL: np.ndarray, vocabulary: Sentinels
) -> tuple[np.ndarray, np.ndarray]:
    """Corrupts raw pieces where ``noise_mask`` says.

    Returns:
      inputs, targets: int32, a row for each piece, with the lengths of the module's docstring.
    """
    return _replace(tokens_BL, mask_BL, vocabulary), _replace(tokens_BL, ~mask_BL, vocabulary)


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


def _replace(tokens_BL: np.ndarray, mask_BL: np.ndarray, vocabulary: Sentinels) -> np.ndarray:
    """A sentinel for each run of True, the other tokens as they are, EOS; as many of each in every row."""
    starts_BL = mask_BL.copy()
    starts_BL[:, 1:] &= ~mask_BL[:, :-1]
    sentinels_BL = vocabulary.sentinel(0) + 1 - starts_BL.cumsum(axis=1, dtype=np.int32)
    kept = np.where(starts_BL, sentinels_BL, tokens_BL)[~mask_BL | starts_BL].reshape(len(tokens_BL), -1)
    return np.pad(kept, ((0, 0), (0, 1)), constant_values=vocabulary.eos_id).astype(np.int32)


def _until_eos(tokens: np.ndarray, vocabulary: Sentinels) -> list[int]:
    ids = [int(token) for token in tokens]
    return ids[: ids.index(vocabulary.eos_id)] if vocabulary.eos_id in ids else ids
