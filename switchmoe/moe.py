"""The mixture-of-experts layer: router, dispatcher and experts as one Linen module.

Letters: B batch, L length, G groups, S tokens per group, D model, F feed-forward, E experts,
C capacity (slots per expert and group).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from switchmoe.dispatch import DISPATCHERS
from switchmoe.layers import activate, kernel_init, param
from switchmoe.routing import ROUTERS, RouterSettings, Routing, expert_capacity
from switchmoe.settings import ModelSettings, MoESettings


def group_shape(batch: int, length: int, group_size: int) -> tuple[int, int]:
    """(G, S) for ``batch`` sequences of ``length`` tokens, with S <= group_size as large as can be.

    A group is whole sequences (so many that they divide the batch) or, where group_size < length, an
    equal part of one. The tokens of a group compete for the experts' slots: with several sequences
    in it, a sequence's output depends on its neighbours. ``group_size=0`` is one sequence.
    """
    if group_size == 0:
        return batch, length
    if group_size >= length:
        together = max(n for n in range(1, batch + 1) if batch % n == 0 and n * length <= group_size)
        return batch // together, together * length
    tokens = max(n for n in range(1, group_size + 1) if length % n == 0)
    return batch * length // tokens, tokens


class Experts(nn.Module):
    """E feed-forwards side by side: ``wo(activation(wi(x)))`` for each expert's own buffer."""

    model: ModelSettings
    moe: MoESettings
    train: bool = False

    @nn.compact
    def __call__(self, x_EGCD: jax.Array) -> jax.Array:
        experts, d, f = self.moe.num_experts, self.model.d_model, self.model.d_ff
        # batch_axis: fan-in is that of one expert, whatever their number.
        init = kernel_init(self.model.init_scale, in_axis=1, out_axis=2, batch_axis=0)
        names = ("expert", "embed", "mlp")

        def up(name: str) -> jax.Array:
            kernel_EDF = param(self, name, init, names, (experts, d, f), x_EGCD.dtype)
            return jnp.einsum("EGCD,EDF->EGCF", x_EGCD, kernel_EDF)

        h_EGCF = activate(self.model.activation, up)
        h_EGCF = nn.Dropout(self.moe.expert_dropout_rate, deterministic=not self.train)(h_EGCF)
        wo_EFD = param(self, "wo", init, ("expert", "mlp", "embed"), (experts, f, d), x_EGCD.dtype)
        return jnp.einsum("EGCF,EFD->EGCD", h_EGCF, wo_EFD)


class MoELayer(nn.Module):
    """Routes each token of a group to an expert's feed-forward and back.

    Randomness: streams ``router`` (jitter) and ``dropout``, in training only.
    """

    model: ModelSettings
    moe: MoESettings
    train: bool = False

    @nn.compact
    def __call__(self, x_GSD: jax.Array, mask_GS: jax.Array | None = None) -> tuple[jax.Array, dict]:
        """Returns (y_GSD, aux).

        A token's y is gate * expert(x), or 0 if it is padding or found no slot: the residual around
        the layer carries it.

        Args:
          x_GSD: tokens in groups (see `group_shape`).
          mask_GS: True where the token is real; None: everywhere.

        aux (float32), each the mean over groups weighted by their real tokens: ``loss``, the weighted
        sum of the router's losses that is to be added to the model's; ``balance_loss`` and
        ``z_loss``, without weights; ``fraction_dropped``; ``router_entropy`` (nats);
        ``expert_load`` [E], the share of the tokens that chose each expert.
        """
        if mask_GS is None:
            mask_GS = jnp.ones(x_GSD.shape[:2], bool)
        routing = self._route(x_GSD, mask_GS)
        dispatcher = DISPATCHERS[self.moe.dispatch](routing)
        x_EGCD = _by_expert(dispatcher.dispatch(x_GSD))
        y_EGCD = _by_expert(Experts(self.model, self.moe, self.train, name="experts")(x_EGCD))
        y_GSD = nn.with_logical_constraint(dispatcher.combine(y_EGCD), ("group", None, None))
        return y_GSD, self._aux(routing)

    def _route(self, x_GSD: jax.Array, mask_GS: jax.Array) -> Routing:
        """Selective precision: input, kernel, logits and all that follows from them are float32."""
        groups, tokens, d = x_GSD.shape
        experts = self.moe.num_experts
        init = nn.initializers.normal(self.moe.router_init_stddev)
        kernel_DE = param(self, "router", init, ("embed", None), (d, experts), jnp.float32)
        router_x_GSD = x_GSD.astype(jnp.float32)
        if self.train and self.moe.jitter:
            low, high = 1 - self.moe.jitter, 1 + self.moe.jitter
            router_x_GSD *= jax.random.uniform(self.make_rng("router"), x_GSD.shape, jnp.float32, low, high)
        logits_GSE = jnp.einsum("GSD,DE->GSE", router_x_GSD, kernel_DE, precision=jax.lax.Precision.HIGHEST)
        factor = self.moe.capacity_factor if self.train else self.moe.eval_capacity_factor
        settings = RouterSettings(capacity=expert_capacity(tokens, experts, factor))
        return jax.vmap(lambda logits, mask: ROUTERS[self.moe.router](logits, mask, None, settings))(
            logits_GSE, mask_GS
        )

    def _aux(self, routing: Routing) -> dict[str, jax.Array]:
        weight_G = routing.tokens / jnp.maximum(routing.tokens.sum(), 1.0)

        def mean(value: jax.Array) -> jax.Array:
            return jnp.einsum("G,G...->...", weight_G, value)

        balance, z = mean(routing.losses["balance"]), mean(routing.losses["z"])
        return {
            "loss": self.moe.balance_loss_weight * balance + self.moe.z_loss_weight * z,
            "balance_loss": balance,
            "z_loss": z,
            "fraction_dropped": mean(routing.fraction_dropped),
            "router_entropy": mean(routing.entropy),
            "expert_load": mean(routing.load_E),
        }


def _by_expert(x_EGCD: jax.Array) -> jax.Array:
    return nn.with_logical_constraint(x_EGCD, ("expert", "expert_group", None, None))
