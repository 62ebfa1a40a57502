"""What a server runs on the device: prompts into slots, and a step of all slots.

A step has one shape whoever is in its slots, no token is dropped, and a row of a product is the same bits whatever the other
rows are and wherever it stands (a fact of the back ends, which `tests/inference/test_serving.py` holds; not of a product of one
row, which only a server of one slot has). So an answer does not depend on its neighbours. A prompt is read by itself, padded to
a length of few.

Letters: B slots, P prompt length, M slots of a memory, D model, V vocabulary, L sparse layers, K choices per token, T the most
alternatives that are told.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from switchmoe.inference import decoding
from switchmoe.inference.decoding import Decoder, State
from switchmoe.inference.generation import SHORTEST
from switchmoe.model.attention import empty_memory
from switchmoe.model.transformer import sparse_layer_names
from switchmoe.settings import Settings

MOST_TOLD = 20  # alternatives of a token, with their log-probabilities
NONE = -1  # in place of an expert: the choice was dropped, or the token is no real one


class Controls(NamedTuple):
    """What each slot's request asks for, as arrays: none of it is compiled in."""

    position_B: np.ndarray  # int32, the place of the token that comes next; -1: nobody is there
    count_B: np.ndarray  # int32, tokens that it has so far
    key_BN: np.ndarray  # uint32, the data of its key
    temperature_B: np.ndarray  # float32, below `decoding.LEAST_HEAT`: the likeliest
    top_k_B: np.ndarray  # int32, 0: all
    top_p_B: np.ndarray  # float32
    tells: np.ndarray  # bool, whether anybody wants alternatives

    @classmethod
    def empty(cls, slots: int) -> "Controls":
        key_width = np.asarray(jax.random.key_data(jax.random.key(0))).shape
        return cls(
            np.full(slots, -1, np.int32),
            np.zeros(slots, np.int32),
            np.zeros((slots, *key_width), np.uint32),
            np.zeros(slots, np.float32),
            np.zeros(slots, np.int32),
            np.ones(slots, np.float32),
            np.array(False),
        )


class Prefilled(NamedTuple):
    """A prompt that was read."""

    state: State  # of one row, with all slots of a memory
    x_1PD: jax.Array | None  # of a decoder alone
    ids_P: jax.Array
    count: int
    expert_LPK: (
        jax.Array | None
    )  # int32, what its tokens chose, of the stack that read them; None: nothing is routed there


class Stepped(NamedTuple):
    """Of each slot the token that came."""

    token_B: np.ndarray  # int32
    log_prob_B: np.ndarray  # float32, by the model, whatever it was drawn with
    best_BT: np.ndarray  # int32, the likeliest tokens, best first, where `Controls.tells`
    best_log_prob_BT: np.ndarray
    expert_LBK: np.ndarray | None  # int32, what the token chose in the decoder's sparse layers


class Scores(NamedTuple):
    """Of each token of a prompt after its first: log-probabilities given those before it."""

    log_prob_P: np.ndarray
    best_PT: np.ndarray
    best_log_prob_PT: np.ndarray


class Programs:
    """A model in ``slots`` slots, on one device.

    Args:
      params: as they were trained; prepared here, once.
      max_prompt: tokens of a prompt, at most.
      max_tokens: new ones, at most.
      check: called when a program is done, before what it computed is told; raises where that is nothing. With it one program
        runs at a time (`offload.runtime.Pager.check`).
    """

    def __init__(
        self,
        settings: Settings,
        params: Any,
        slots: int,
        max_prompt: int,
        max_tokens: int,
        check: Callable[[], None] | None = None,
    ):
        self.slots, self.max_prompt, self.max_tokens = slots, max_prompt, max_tokens
        self.encodes = "encoder" in settings.stacks
        self.prompt_layers, self.layers = layer_names(settings)
        self.settings, self._params = decoding.laid_out(settings, params)
        self._check = check
        self._trace = bool(self.prompt_layers or self.layers)
        self._fresh = jax.jit(self._empty)
        self._state = self._fresh()
        self._prefill = jax.jit(self._prefilled)
        self._insert = jax.jit(_inserted, donate_argnums=0)
        self._step = jax.jit(self._stepped, donate_argnums=1)
        self._score = jax.jit(self._scored)
        self._key = jax.jit(lambda seed, n: jax.random.key_data(jax.random.fold_in(jax.random.key(seed), n)))

    @property
    def lengths(self) -> list[int]:
        """To which prompts are padded."""
        found = [SHORTEST]
        while found[-1] < self.max_prompt:
            found.append(found[-1] * 2)
        return [*found[:-1], max(self.max_prompt, 1)]

    def warm(self) -> Iterator[str]:
        """Compiles all there is, a program at a time; says what comes next."""
        for length in self.lengths:
            yield f"prompts of {length} tokens"
            prefilled = self.prefill([0] * length)
            if not self.encodes:
                self.scores(prefilled)
        yield f"a step of {self.slots} slots"
        self.key(0, 0)
        for _ in range(2):  # a state that a step gave is another argument than a fresh one
            self.insert(prefilled, 0)
            self.step(Controls.empty(self.slots))
        self.reset()

    def reset(self) -> None:
        """Empties all slots."""
        self._state = None  # so that there is room for another
        self._state = self._fresh()

    def key(self, seed: int, number: int) -> np.ndarray:
        """The data of the key with which `generation.Generator` draws the answer to prompt ``number``."""
        return np.asarray(self._key(np.int32(seed), np.int32(number)))

    def prefill(self, ids: Sequence[int]) -> Prefilled:
        """Reads a prompt of 1 to ``max_prompt`` tokens."""
        length = next(length for length in self.lengths if length >= len(ids))
        ids_P = np.zeros(length, np.int32)
        ids_P[: len(ids)] = ids
        found = self._prefill(self._params, ids_P[None], np.array([len(ids)], np.int32))
        state, x_1PD, expert_LPK = self._checked(found)
        return Prefilled(state, x_1PD, ids_P, len(ids), expert_LPK)

    def first_position(self, prefilled: Prefilled) -> int:
        """The place of the first new token."""
        return 1 if self.encodes else prefilled.count

    def insert(self, prefilled: Prefilled, slot: int) -> None:
        """Puts a prompt into a slot, from which nothing of an earlier one remains."""
        self._state = self._insert(self._state, prefilled.state, np.int32(slot))

    def scores(self, prefilled: Prefilled) -> Scores:
        """Of a decoder alone."""
        found = jax.device_get(self._score(self._params, prefilled.x_1PD, prefilled.ids_P))
        return Scores(*(value[: prefilled.count - 1] for value in found))

    def step(self, controls: Controls) -> Stepped:
        """A token of each slot in use."""
        self._state, found = self._checked(self._step(self._params, self._state, controls))
        return jax.device_get(found)

    def _checked(self, found: Any) -> Any:
        if self._check:
            jax.block_until_ready(found)
            self._check()
        return found

    def _decoder(self, params: Any) -> Decoder:
        return Decoder(self.settings, params, self._trace)

    def _empty(self) -> State:
        model, layers = self.settings.model, self.settings.layers("decoder")
        read = 1 if self.encodes else self.max_prompt
        memory = empty_memory(model, layers, self.slots, read + self.max_tokens)
        memory = memory.replace(used=jnp.zeros(self.slots, jnp.int32))
        if self.encodes:
            shape = (self.slots, model.kv_heads, self.max_prompt, model.d_kv)
            cross = (jnp.zeros(shape, model.dtype),) * 2
            blocks = tuple(block | {"cross": cross} for block in memory.blocks)
            real_BM = jnp.zeros((self.slots, self.max_prompt), bool)
            memory = memory.replace(blocks=blocks, encoded_BM=real_BM)
        x_BD = jnp.zeros((self.slots, model.d_model), model.dtype)
        return State(x_BD, jnp.zeros(self.slots, jnp.int32), memory)

    def _prefilled(self, params: Any, ids_1P: jax.Array, count_1: jax.Array) -> tuple:
        state, x_1PD, told = self._decoder(params).opened(ids_1P, count_1, 0)
        memory = state.memory.replace(told=None, used=jnp.zeros(1, jnp.int32))
        state = jax.tree.map(_widened, state._replace(memory=memory), jax.eval_shape(self._empty))
        real_1P = jnp.arange(ids_1P.shape[1])[None] < count_1[:, None]
        chosen_L1PK = _chosen(told, real_1P)
        return state, x_1PD, None if chosen_L1PK is None else chosen_L1PK[:, 0]

    def _stepped(self, params: Any, state: State, controls: Controls) -> tuple[State, Stepped]:
        decoder = self._decoder(params)
        logits_BV = decoder.logits(state)
        token_B = _drawn(logits_BV, controls)
        log_prob_BV = logits_BV - jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
        told_B = jnp.take_along_axis(log_prob_BV, token_B[:, None], axis=-1)[:, 0]
        best_BT, best_log_prob_BT = _best(log_prob_BV, controls.tells)
        position_B = jnp.asarray(controls.position_B)
        memory = state.memory.replace(used=jnp.maximum(position_B, 0))
        state = decoder.read(token_B, State(state.x_BD, position_B, memory))
        chosen_LB1K = _chosen(state.memory.told, position_B[:, None] >= 0)
        expert_LBK = None if chosen_LB1K is None else chosen_LB1K[:, :, 0]
        state = state._replace(memory=state.memory.replace(told=None))
        return state, Stepped(token_B, told_B, best_BT, best_log_prob_BT, expert_LBK)

    def _scored(self, params: Any, x_1PD: jax.Array, ids_P: jax.Array) -> Scores:
        logits_PV = self._decoder(params).logits(State(x_1PD[0, :-1], None, None))
        log_prob_PV = logits_PV - jax.nn.logsumexp(logits_PV, axis=-1, keepdims=True)
        told_P = jnp.take_along_axis(log_prob_PV, ids_P[1:, None], axis=-1)[:, 0]
        return Scores(told_P, *_best(log_prob_PV, jnp.array(True)))


def layer_names(settings: Settings) -> tuple[list[str], list[str]]:
    """Names of the sparse layers that route prompts, and that route new tokens; none with soft experts, which choose nothing."""
    if not settings.moe.routed or settings.moe.router == "soft":
        return [], []
    names = sparse_layer_names(settings)
    own = [name for name in names if name.startswith("decoder/")]
    return [name for name in names if name not in own] if "encoder" in settings.stacks else own, own


def _widened(row: jax.Array, whole: jax.ShapeDtypeStruct) -> jax.Array:
    """A row's array with as many slots of a memory as the whole has; the position of what is added is -1."""
    lacking = [
        (0, 0),
        *((0, large - small) for small, large in zip(row.shape[1:], whole.shape[1:], strict=True)),
    ]
    return jnp.pad(row, lacking, constant_values=-1 if row.dtype == jnp.int32 else 0)


def _inserted(state: State, row: State, slot: jax.Array) -> State:
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=0)
    return jax.tree.map(lambda whole, one: put(whole, one.astype(whole.dtype)), state, row)


def _chosen(told: dict[str, jax.Array] | None, real_BL: jax.Array) -> jax.Array | None:
    """Experts [L, B, length, K] of a trace, `NONE` where there is none."""
    if told is None:
        return None
    good = told["kept"] & real_BL[None, ..., None]
    return jnp.where(good, told["expert"], NONE).astype(jnp.int32)


def _best(log_prob_BV: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the likeliest tokens, their log-probabilities), zeros where nobody wants them."""
    most = min(MOST_TOLD, log_prob_BV.shape[-1])

    def found() -> tuple[jax.Array, jax.Array]:
        value_BT, index_BT = jax.lax.top_k(log_prob_BV, most)
        return index_BT.astype(jnp.int32), value_BT

    shape = (len(log_prob_BV), most)
    return jax.lax.cond(
        wanted, found, lambda: (jnp.zeros(shape, jnp.int32), jnp.zeros(shape, log_prob_BV.dtype))
    )


def _drawn(logits_BV: jax.Array, controls: Controls) -> jax.Array:
    """Each slot's token, as `decoding.sample` chooses it. A slot that draws the likeliest, or from all, pays for no more."""

    def draw(
        logits_V: jax.Array, count: jax.Array, key_N: jax.Array, heat: jax.Array, k: jax.Array, p: jax.Array
    ) -> jax.Array:
        heated_V = logits_V / heat
        limits = (k > 0) | (p < 1)
        open_V = jax.lax.cond(limits, lambda: limited(heated_V, k, p), lambda: heated_V)
        key = jax.random.fold_in(jax.random.wrap_key_data(key_N), count)
        return jax.random.categorical(key, open_V).astype(jnp.int32)

    def one(slot: tuple) -> jax.Array:
        first, logits_V, count, key_N, heat, k, p = slot
        return jax.lax.cond(
            heat >= decoding.LEAST_HEAT, lambda: draw(logits_V, count, key_N, heat, k, p), lambda: first
        )

    numbers = map(jnp.asarray, controls[1:6])
    return jax.lax.map(one, (decoding.likeliest(logits_BV), logits_BV, *numbers))


def limited(logits_V: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """`decoding.limited` of one row, with limits that are arrays."""
    sorted_V = jnp.sort(logits_V, descending=True)
    least_k = jnp.where(top_k > 0, sorted_V[jnp.clip(top_k, 1, len(sorted_V)) - 1], -jnp.inf)
    sorted_V = jnp.where(sorted_V < least_k, -jnp.inf, sorted_V)
    prob_V = jax.nn.softmax(sorted_V)
    kept_V = jnp.cumsum(prob_V) - prob_V < top_p
    least_p = jnp.where(top_p < 1, jnp.where(kept_V, sorted_V, jnp.inf).min(), -jnp.inf)
    return jnp.where(logits_V < jnp.maximum(least_k, least_p), -jnp.inf, logits_V)
