"""Greedy decoding.

Letters: B batch, L length, D model.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from switchmoe.model.transformer import PAD_ID, Transformer
from switchmoe.routing import NOT_CAUSAL
from switchmoe.settings import Settings


def greedy(params: Any, inputs_BL: jax.Array, length: int, settings: Settings, eos_id: int = 1) -> jax.Array:
    """The most probable next token, ``length`` times; 0 after the first ``eos_id``.

    Each step runs the whole decoder over ``length`` positions: a causal stack gives a position the same output whatever
    follows it, as in teacher forcing. A sequence is a group of its own and no token is dropped (but for an encoder's
    expert choice and Soft MoE, in which tokens do not choose), so what else is in the batch changes nothing.

    Returns:
      tokens_BL, int32, of shape [B, length].
    """
    model = Transformer(_alone(settings))
    variables = {"params": params}
    encoded_BLD, _ = model.apply(variables, inputs_BL, method="encode")
    real_BL = jnp.ones((inputs_BL.shape[0], length), bool)

    def step(position: jax.Array, tokens_BL: jax.Array) -> jax.Array:
        x_BLD, _ = model.apply(
            variables, encoded_BLD, inputs_BL != PAD_ID, tokens_BL, real_BL, method="decode"
        )
        x_BD = jax.lax.dynamic_index_in_dim(x_BLD, position, 1, keepdims=False)
        next_B = model.apply(variables, x_BD, method="logits").argmax(axis=-1)
        ended_B = (tokens_BL == eos_id).any(axis=1)
        return tokens_BL.at[:, position].set(jnp.where(ended_B, PAD_ID, next_B).astype(jnp.int32))

    return jax.lax.fori_loop(0, length, step, jnp.full(real_BL.shape, PAD_ID, jnp.int32))


def _alone(settings: Settings) -> Settings:
    """The settings with which a sequence's output in evaluation does not depend on its neighbours in the batch."""
    moe = dataclasses.replace(settings.moe, eval_group_size=0)
    if moe.router not in NOT_CAUSAL:
        moe = dataclasses.replace(moe, dropless=True, dispatch="ragged")
    return dataclasses.replace(settings, moe=moe)
