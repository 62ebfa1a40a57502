"""Decoding: one token after the other, each from what the decoder keeps of those before it (`attention.Memory`).

A sequence is a group of its own and no token is dropped (but for an encoder's expert choice and Soft MoE, in which tokens
do not choose), so what else is in the batch changes nothing. One thing does: how many tokens an expert chooses is rounded for the
length to which a batch is padded, so with expert choice an answer may depend on the longest prompt of its batch. In a model whose
padding takes slots too (Hugging Face's Switch) what comes behind a sequence takes none of its own.

Letters: B batch, P prompt length, N new tokens, D model, V vocabulary, M slots.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from switchmoe.dispatch.dispatchers import DECODING
from switchmoe.model.attention import JOINED, Memory, empty_memory
from switchmoe.model.moe import ON_DISK
from switchmoe.model.transformer import PAD_ID, Transformer, unstacked, without_limits
from switchmoe.parallel.sharding import path_keys
from switchmoe.quantised import SCALE
from switchmoe.routing import NOT_CAUSAL
from switchmoe.settings import Settings

# How many axes of each kernel are inputs'.
INPUT_AXES = {JOINED: 1, "query": 1, "key": 1, "value": 1, "out": 2, "wi": 1, "wi_gate": 1, "wo": 1}
LEAST_HEAT = 1e-4  # a temperature below is 0: logits divided by less overflow
MOST_APART = 16  # experts up to which each has its own code in a program of decoding
# The jax from which on a CPU multiplies few rows of bfloat16 in less time than of float32.
FAST_BF16 = (0, 11)
# Parameters that are used as such
FLOAT32 = (
    ON_DISK,
    "router",
    "relative_bias",
    "query_norm",
    "key_norm",
    *(name + SCALE for name in INPUT_AXES),
)


@dataclasses.dataclass(frozen=True)
class Choosing:
    """How a token is chosen."""

    temperature: float = 0.0  # below `LEAST_HEAT`: the likeliest; else drawn, logits divided by it
    top_k: int = 0  # drawn among the likeliest so many; 0: all
    top_p: float = 1.0  # drawn among the fewest whose probabilities sum to this
    stop_ids: tuple[int, ...] = (1,)  # tokens after which nothing comes

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature}: accepted is a number >= 0")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: accepted is an integer >= 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: accepted is a number > 0, at most 1")


class Decoded(NamedTuple):
    tokens_BN: jax.Array  # int32, 0 after a stop token
    score_B: jax.Array  # float32, the sum of the tokens' log-probabilities by the model


class State(NamedTuple):
    """Before the next token is read."""

    x_BD: jax.Array  # what predicts it
    position_B: jax.Array  # int32, its place in its sequence
    memory: Memory


@struct.dataclass
class Laid:
    """A parameter as a step of decoding reads it fastest on a CPU: kernels the other way round, each expert's by itself."""

    parts: tuple[jax.Array, ...]
    shape: tuple[int, ...] = struct.field(pytree_node=False)

    def whole(self) -> jax.Array:
        """As the model has it. XLA reads the parts as they lie, if it finds this beside what reads it."""
        kernels = [part.T for part in self.parts]
        return (jnp.stack(kernels) if len(kernels) > 1 else kernels[0]).reshape(self.shape)


def prepared(settings: Settings, params: Any) -> tuple[Settings, Any]:
    """(settings, parameters) to decode with: no scan over layers, and no limits to experts but an encoder's own."""
    moe = dataclasses.replace(settings.moe, eval_group_size=0)
    if moe.router not in NOT_CAUSAL:
        # A decoder reads a token at a time, which has a slot always.
        own = moe.capacity and moe.route_padding and "encoder" in settings.stacks and not moe.dropless
        moe = dataclasses.replace(moe, dispatch="ragged") if own else without_limits(moe)
    return unstacked(dataclasses.replace(settings, moe=moe), params)


def laid_out(settings: Settings, params: Any) -> tuple[Settings, Any]:
    """What `prepared` gives, so that a step is fast on one device: kernels in the activations' type and, on a CPU, `Laid`.

    A CPU with jax 0.10 decodes a bfloat16 model in float32, with its rounded kernels.
    """
    settings, params = prepared(settings, params)
    kept, settings = settings.model.dtype, as_computed(settings)
    cpu, apart = jax.default_backend() == "cpu", settings.moe.dispatch == DECODING

    def lay(path: tuple, leaf: jax.Array) -> jax.Array | Laid:
        keys = path_keys(path)
        leaf = jnp.asarray(leaf)  # once: a program is given arrays of numpy anew at every call
        if leaf.ndim < 2 or leaf.dtype == jnp.int8 or any(key in FLOAT32 for key in keys):
            return leaf
        leaf, experts = leaf.astype(kept).astype(settings.model.dtype), "experts" in keys
        if not cpu or keys[-1] not in INPUT_AXES or (experts and not apart):
            return leaf
        kernels = leaf if experts else leaf[None]
        rows = math.prod(kernels.shape[1 : 1 + INPUT_AXES[keys[-1]]])
        return Laid(tuple(kernel.reshape(rows, -1).T for kernel in kernels), leaf.shape)

    return settings, jax.tree_util.tree_map_with_path(lay, _joined(params))


def as_computed(settings: Settings) -> Settings:
    """The settings of `prepared` as `laid_out` gives them: in what type a CPU computes, and how it multiplies experts."""
    cpu, moe = jax.default_backend() == "cpu", settings.moe
    if cpu and settings.model.dtype == "bfloat16" and jax.__version_info__ < FAST_BF16:
        settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, dtype="float32"))
    # Of integers the kernels of experts with rows are made, each where it is used: `grouped.blocked_matmul`.
    sorted_rows = moe.dropless or moe.dispatch == "ragged"
    if cpu and sorted_rows and moe.total_experts <= MOST_APART and not moe.expert_bits:
        settings = dataclasses.replace(settings, moe=dataclasses.replace(moe, dispatch=DECODING))
    return settings


def _joined(params: dict) -> dict:
    """With the kernels of a self-attention as one: a small product costs more than its share of a larger one's time."""
    found = {name: _joined(part) if isinstance(part, dict) else part for name, part in params.items()}
    names = ("query", "key", "value")
    if "self" in found and set(names) <= found["self"].keys():
        own = dict(found["self"])
        kernels = [own.pop(name) for name in names]
        own[JOINED] = jnp.concatenate([kernel.reshape(len(kernel), -1) for kernel in kernels], axis=1)
        found["self"] = own
    return found


class Decoder:
    """A model's functions, with settings and parameters of `prepared` or `laid_out`.

    With ``trace`` a memory tells what the tokens read last chose (`Memory.told`).
    """

    def __init__(self, settings: Settings, params: Any, trace: bool = False):
        self._settings, self._model, self._params = settings, Transformer(settings, trace=trace), params

    def start(self, prompt_BP: jax.Array, count_B: jax.Array, tokens: int) -> State:
        """Reads prompts: those of an encoder in it, a decoder's own in the decoder.

        Args:
          prompt_BP: 0 after each one's ``count_B`` tokens.
          tokens: how many will be read after them.
        """
        return self.opened(prompt_BP, count_B, tokens)[0]

    def opened(
        self, prompt_BP: jax.Array, count_B: jax.Array, tokens: int
    ) -> tuple[State, jax.Array | None, dict[str, jax.Array] | None]:
        """(`start`'s state; of a decoder alone what predicts the token after each of the prompts', [B, P, D]; with a trace what
        the prompts' tokens chose)."""
        batch, length = prompt_BP.shape
        place_BP = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], prompt_BP.shape)
        real_BP = place_BP < count_B[:, None]
        layers, model = self._settings.layers("decoder"), self._settings.model
        if "encoder" in self._settings.stacks:
            inputs_BP = jnp.where(real_BP, prompt_BP, PAD_ID)
            encoded_BPD, aux = self._apply(inputs_BP, method="encode")
            memory = empty_memory(model, layers, batch, tokens + 1)
            first_B = jnp.full(batch, self._settings.data.bos_id, jnp.int32)
            encoded = encoded_BPD, inputs_BP != PAD_ID
            state = self._read(first_B, jnp.zeros_like(first_B), memory, encoded)
            return state, None, aux.get("trace")
        memory = empty_memory(model, layers, batch, length + tokens)
        x_BPD, memory = self._apply(prompt_BP, jnp.where(real_BP, place_BP, -1), memory, method="read")
        x_BD = jnp.take_along_axis(x_BPD, (count_B - 1)[:, None, None], axis=1)[:, 0]
        return State(x_BD, count_B, memory), x_BPD, memory.told

    def read(self, token_B: jax.Array, state: State) -> State:
        """The state after another token."""
        return self._read(token_B, state.position_B, state.memory)

    def logits(self, state: State) -> jax.Array:
        """Float32 [B, V] of the next token."""
        return self._apply(state.x_BD, method="logits")

    def _read(self, token_B: jax.Array, position_B: jax.Array, memory: Memory, *encoded: Any) -> State:
        x_B1D, memory = self._apply(token_B[:, None], position_B[:, None], memory, *encoded, method="read")
        return State(x_B1D[:, 0], position_B + 1, memory)

    def _apply(self, *arguments: Any, method: str) -> Any:
        # Here, so that it stands in the loop's body, beside the products.
        is_laid = lambda leaf: isinstance(leaf, Laid)  # noqa: E731
        params = jax.tree.map(lambda x: x.whole() if is_laid(x) else x, self._params, is_leaf=is_laid)
        return self._model.apply({"params": params}, *arguments, method=method)


def sample(
    params: Any,
    prompt_BP: jax.Array,
    count_B: jax.Array,
    key_B: jax.Array,
    tokens: int,
    settings: Settings,
    how: Choosing,
) -> Decoded:
    """``tokens`` tokens after each prompt, the likeliest or drawn; fewer where a stop token comes before.

    Args:
      params: with the settings, of `prepared` or `laid_out`.
      prompt_BP: int32, the encoder's inputs, or of a decoder alone what it reads first (one token at least).
      count_B: each prompt's tokens; 0: a row that fills the batch up, and has no answer.
      key_B: a key for each sequence, which draws its tokens whoever is beside it.
    """
    decoder = Decoder(settings, params)

    def choose(state: State, step: jax.Array, ended_B: jax.Array) -> tuple[jax.Array, ...]:
        logits_BV = decoder.logits(state)
        token_B = _choose(logits_BV, key_B, step, how)
        chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
        gain_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
        token_B = jnp.where(ended_B, PAD_ID, token_B)
        return token_B, jnp.where(ended_B, 0.0, gain_B), ended_B | is_stop(token_B, how.stop_ids)

    def go_on(carry: tuple) -> jax.Array:
        step, _, _, ended_B, *_ = carry
        return (step < tokens) & ~ended_B.all()

    def one(carry: tuple) -> tuple:
        step, state, token_B, ended_B, tokens_BN, score_B = carry
        state = decoder.read(token_B, state)
        token_B, gain_B, ended_B = choose(state, step, ended_B)
        tokens_BN = jax.lax.dynamic_update_slice_in_dim(tokens_BN, token_B[:, None], step, axis=1)
        return step + 1, state, token_B, ended_B, tokens_BN, score_B + gain_B

    state = decoder.start(prompt_BP, count_B, tokens - 1)
    token_B, score_B, ended_B = choose(state, jnp.int32(0), count_B == 0)
    tokens_BN = jnp.full((len(prompt_BP), tokens), PAD_ID, jnp.int32).at[:, 0].set(token_B)
    carry = jnp.int32(1), state, token_B, ended_B, tokens_BN, score_B
    *_, tokens_BN, score_B = jax.lax.while_loop(go_on, one, carry)
    return Decoded(tokens_BN, score_B)


def is_stop(token: jax.Array, stop_ids: tuple[int, ...]) -> jax.Array:
    return jnp.isin(token, jnp.array(stop_ids, jnp.int32)) if stop_ids else jnp.zeros(token.shape, bool)


def _choose(logits_BV: jax.Array, key_B: jax.Array, step: jax.Array, how: Choosing) -> jax.Array:
    if how.temperature < LEAST_HEAT:
        return likeliest(logits_BV)
    open_BV = limited(logits_BV / how.temperature, how.top_k, how.top_p)
    draw = jax.vmap(lambda key, logits_V: jax.random.categorical(jax.random.fold_in(key, step), logits_V))
    return draw(key_B, open_BV).astype(jnp.int32)


def likeliest(logits_BV: jax.Array) -> jax.Array:
    """The first of the largest. By maxima, of which XLA's CPU back end computes many at once, as it does not argmax."""
    place_V = jnp.arange(logits_BV.shape[-1], dtype=jnp.int32)
    largest_BV = logits_BV == logits_BV.max(axis=-1, keepdims=True)
    return jnp.where(largest_BV, place_V[None], len(place_V) - 1).min(axis=-1)


def limited(logits_BV: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """The logits of what may be drawn, -inf elsewhere: the ``top_k`` largest, and of these the fewest with ``top_p``.

    Equal logits are kept or left together, so with ties more may remain.
    """
    if top_k:
        least_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if top_p < 1.0:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        prob_BV = jax.nn.softmax(sorted_BV, axis=-1)
        kept_BV = jnp.cumsum(prob_BV, axis=-1) - prob_BV < top_p  # the first is always kept
        least_B1 = jnp.where(kept_BV, sorted_BV, jnp.inf).min(axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return logits_BV
