"""Many prompts of unequal lengths: batches of few shapes, each with one compiled program.

Letters: B batch, P prompt length, N new tokens.
"""

import copy
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from switchmoe.inference import decoding
from switchmoe.inference.beams import beam_search
from switchmoe.inference.decoding import Choosing, Decoded
from switchmoe.settings import Settings

SHORTEST = 16  # prompts are padded to this times a power of two


class Answer(NamedTuple):
    ids: list[int]  # with the stop token, where one came
    score: float  # the sum of the log-probabilities; with beams over length**length_penalty


class Generator:
    """Continues prompts with a trained model.

    Args:
      params: as they were trained; prepared here, once.
      tokens: new ones, at most.
      beams: 1: as ``how`` says; more: beam search.
      batch_size: prompts at once; a batch that is not full is filled up.
      check: called when a batch is computed, before it is told; raises where it is nothing (`offload.runtime.Pager.check`).
    """

    def __init__(
        self,
        settings: Settings,
        params: Any,
        tokens: int,
        how: Choosing | None = None,
        beams: int = 1,
        length_penalty: float = 1.0,
        batch_size: int = 16,
        seed: int = 0,
        check: Callable[[], None] = lambda: None,
    ):
        for name, value in (("max_tokens", tokens), ("beams", beams), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name}={value}: accepted is an integer >= 1")
        how = how or Choosing()
        if beams > 1 and how.temperature:
            raise ValueError(f"beams={beams}: accepted with a temperature is 1")
        self._settings, self._params = decoding.laid_out(settings, params)
        self._tokens, self._how, self._batch_size, self._check = tokens, how, batch_size, check
        self._key = jax.random.key(seed)
        self._search = beams > 1, beams, length_penalty
        self._program = jax.jit(functools.partial(self._run, search=self._search))

    def with_tokens(self, tokens: int) -> "Generator":
        """One of the same parameters, which are not copied, for so many new tokens."""
        other = copy.copy(self)
        other._tokens = tokens
        other._program = jax.jit(functools.partial(other._run, search=other._search))
        return other

    def _run(
        self, params: Any, prompt_BP: jax.Array, count_B: jax.Array, number_B: jax.Array, search: tuple
    ) -> Decoded:
        searches, count, penalty = search
        if searches:
            fixed = self._tokens, self._settings, count, penalty, self._how.stop_ids
            return beam_search(params, prompt_BP, count_B, *fixed)
        key_B = jax.vmap(functools.partial(jax.random.fold_in, self._key))(number_B)
        return decoding.sample(params, prompt_BP, count_B, key_B, self._tokens, self._settings, self._how)

    def __call__(self, prompts: Sequence[Sequence[int]], first: int = 0) -> list[Answer]:
        """Answers in the order of the prompts.

        Args:
          prompts: token ids as the model reads them: an encoder's with their EOS, a decoder's own with what it begins with.
          first: the number of the first prompt, on which with the seed what is drawn depends.

        Raises:
          ValueError: an empty prompt, or an id that the model does not have.
        """
        return [answer for _, answers in self.batches(prompts, first) for answer in answers]

    def batches(self, prompts: Sequence[Sequence[int]], first: int = 0) -> Iterator[tuple[int, list[Answer]]]:
        """(prompts done, the answers of a batch), batch by batch."""
        for prompt in prompts:
            self.check(prompt)
        rows = min(len(prompts), self._batch_size)
        if len(prompts) > rows and padded(prompts) > padded(prompts[:rows]):
            # What can't be computed of a later batch is said before the first one is.
            prompt_BP, count_B = np.zeros((rows, padded(prompts)), np.int32), np.zeros(rows, np.int32)
            jax.eval_shape(self._program, self._params, prompt_BP, count_B, count_B)
        for start in range(0, len(prompts), self._batch_size):
            part = prompts[start : start + self._batch_size]
            prompt_BP = np.zeros((rows, padded(part)), np.int32)
            count_B = np.zeros(rows, np.int32)
            for row, prompt in enumerate(part):
                prompt_BP[row, : len(prompt)] = prompt
                count_B[row] = len(prompt)
            number_B = np.arange(first + start, first + start + rows, dtype=np.int32)
            found = jax.device_get(self._program(self._params, prompt_BP, count_B, number_B))
            self._check()
            yield start + len(part), [self._answer(*row) for row in zip(*found, strict=True)][: len(part)]

    def check(self, prompt: Sequence[int]) -> None:
        """Raises ValueError, one line: an empty prompt, or an id that the model does not have."""
        if not len(prompt):
            raise ValueError("a prompt without tokens: accepted is one token or more")
        rows = self._settings.embedding_rows
        bad = [int(token) for token in prompt if not 0 <= token < rows]
        if bad:
            raise ValueError(f"the prompt's id {bad[0]}: accepted is an integer from 0 to {rows - 1}")

    def _answer(self, tokens_N: np.ndarray, score: np.ndarray) -> Answer:
        stops = np.flatnonzero(np.isin(tokens_N, self._how.stop_ids))
        end = stops[0] + 1 if len(stops) else len(tokens_N)
        return Answer([int(token) for token in tokens_N[:end]], float(score))


def padded(prompts: Sequence[Sequence[int]]) -> int:
    """To how many tokens these prompts are filled up."""
    longest, length = max(map(len, prompts)), SHORTEST
    while length < longest:
        length *= 2
    return length


def prompt_ids(text: str, settings: Settings, vocabulary: Any) -> list[int]:
    """A text as the model reads it: in an encoder it ends with EOS, in a decoder alone it begins with `data.bos_id`.

    An encoder's may have sentinels, written <extra_id_0> and so on.
    """
    if "encoder" not in settings.stacks:
        return [settings.data.bos_id, *map(int, vocabulary.encode(text))]
    ids: list[int] = []
    for number, part in enumerate(re.split(r"<extra_id_(\d+)>", text)):
        ids += [vocabulary.sentinel(int(part))] if number % 2 else map(int, vocabulary.encode(part))
    return [*ids, vocabulary.eos_id]


def continues(prompt: str, settings: Settings) -> bool:
    """Whether an answer's text goes on with the prompt's, so that a blank which it begins with is part of it.

    An encoder's prompt is another text, but for a model that was trained to go on with it. After a blank that a vocabulary
    took off the prompt's end comes no second one.
    """
    goes_on = settings.data.objective == "prefix_lm" and not settings.task.names
    return ("encoder" not in settings.stacks or goes_on) and bool(prompt) and not prompt[-1].isspace()


def greedy(
    params: Any, prompt_BP: jax.Array, count_B: jax.Array, tokens: int, settings: Settings
) -> jax.Array:
    """The likeliest tokens_BN, within a program: of parameters as they are trained."""
    settings, params = decoding.prepared(settings, params)
    keys = jnp.zeros((len(prompt_BP),), jnp.uint32)  # nothing is drawn
    return decoding.sample(params, prompt_BP, count_B, keys, tokens, settings, Choosing()).tokens_BN
