"""Beam search, as `transformers.generate` has it with early_stopping=False.

Letters: B batch, W beams, N new tokens, C candidates, V vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from switchmoe.inference.decoding import Decoded, Decoder, State, is_stop
from switchmoe.model.transformer import PAD_ID
from switchmoe.settings import Settings

NEVER = -1e9  # the score of what is not there


class _Beams(NamedTuple):
    tokens_BWN: jax.Array  # int32, 0 where there are none yet
    score_BW: jax.Array  # float32

    def best(self, count: int) -> tuple["_Beams", jax.Array]:
        """(those with the ``count`` highest scores, where they were)."""
        score_BW, index_BW = jax.lax.top_k(self.score_BW, count)
        return _Beams(jnp.take_along_axis(self.tokens_BWN, index_BW[..., None], axis=1), score_BW), index_BW


class _Search(NamedTuple):
    step: jax.Array  # tokens so far
    state: State  # of B * W sequences
    live: _Beams  # log-probabilities
    ended: _Beams  # over length**penalty, NEVER where there are fewer
    open_B: jax.Array  # bool: a live beam may still end better than the worst that has ended
    stuck: jax.Array  # bool: no candidate of any sequence can go on


def beam_search(
    params: Any,
    prompt_BP: jax.Array,
    count_B: jax.Array,
    tokens: int,
    settings: Settings,
    beams: int,
    length_penalty: float = 1.0,
    stop_ids: tuple[int, ...] = (1,),
) -> Decoded:
    """The best of ``beams`` continuations by log-probability / length**length_penalty, which is its score.

    At each step the likeliest of all continuations of a sequence's beams are ranked. Of the first ``beams`` those that
    ended are kept, if they are better than what is kept; the best that did not end go on. A sequence is done when its
    best live beam, ended now, would not be better than the worst that is kept.

    Args: as `decoding.sample`.
    """
    decoder = Decoder(settings, params)
    batch, candidates = len(prompt_BP), beams * (1 + max(1, len(stop_ids)))

    def rows(x: jax.Array) -> jax.Array:
        return x.reshape(batch * beams, *x.shape[2:])

    def rank(search: _Search) -> _Search:
        """All but reading what is chosen."""
        log_prob_BWV = jax.nn.log_softmax(decoder.logits(search.state), axis=-1).reshape(batch, beams, -1)
        vocabulary = log_prob_BWV.shape[-1]
        total_BWV = log_prob_BWV + search.live.score_BW[..., None]
        score_BC, index_BC = jax.lax.top_k(total_BWV.reshape(batch, -1), candidates)
        beam_BC, token_BC = index_BC // vocabulary, (index_BC % vocabulary).astype(jnp.int32)
        tokens_BCN = jnp.take_along_axis(search.live.tokens_BWN, beam_BC[..., None], axis=1)
        tokens_BCN = jax.lax.dynamic_update_slice_in_dim(tokens_BCN, token_BC[..., None], search.step, axis=2)
        stopped_BC = is_stop(token_BC, stop_ids) | (search.step + 1 == tokens)
        going_BC = score_BC + jnp.where(stopped_BC, NEVER, 0.0)
        live, index_BW = _Beams(tokens_BCN, going_BC).best(beams)
        ends_BC = stopped_BC & (jnp.arange(candidates) < beams)[None] & search.open_B[:, None]
        length = (search.step + 1).astype(jnp.float32) ** length_penalty
        ending_BC = jnp.where(ends_BC, score_BC / length, NEVER)
        both = _Beams(
            jnp.concatenate([search.ended.tokens_BWN, tokens_BCN], axis=1),
            jnp.concatenate([search.ended.score_BW, ending_BC], axis=1),
        )
        ended, _ = both.best(beams)
        open_B = search.open_B & (live.score_BW[:, 0] / length > ended.score_BW.min(axis=1))
        parent_BW = jnp.take_along_axis(beam_BC, index_BW, axis=1)
        state = _reordered(search.state, rows(parent_BW + jnp.arange(batch)[:, None] * beams))
        return _Search(search.step + 1, state, live, ended, open_B, stopped_BC.all())

    def go_on(search: _Search) -> jax.Array:
        return search.open_B.any() & ~search.stuck

    def one(search: _Search) -> _Search:
        token_BW = jax.lax.dynamic_index_in_dim(search.live.tokens_BWN, search.step - 1, 2, keepdims=False)
        return rank(search._replace(state=decoder.read(rows(token_BW), search.state)))

    state = decoder.start(prompt_BP, count_B, tokens - 1)
    wide = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0) if x.ndim else x, state)
    first_BW = jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0.0, NEVER)[None], (batch, beams))
    none_BWN = jnp.full((batch, beams, tokens), PAD_ID, jnp.int32)
    ended = _Beams(none_BWN, jnp.full((batch, beams), NEVER))
    begun = _Search(jnp.int32(0), wide, _Beams(none_BWN, first_BW), ended, count_B > 0, jnp.array(False))
    done = jax.lax.while_loop(go_on, one, rank(begun))
    return Decoded(done.ended.tokens_BWN[:, 0], done.ended.score_BW[:, 0])


def _reordered(state: State, index_R: jax.Array) -> State:
    """The states of these rows. What is of the encoder is the same for all beams of a sequence."""
    blocks = tuple(
        block | {"self": tuple(jnp.take(x, index_R, axis=0) for x in block["self"])}
        for block in state.memory.blocks
    )
    return state._replace(memory=state.memory.replace(blocks=blocks))
