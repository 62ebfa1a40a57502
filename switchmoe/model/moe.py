"""The mixture-of-experts layer: router, dispatcher and experts as one Linen module.

Letters: B batch, L length, G groups, S tokens per group, D model, F feed-forward, E experts,
C capacity (slots per expert and group), H heads, K width of a head.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from switchmoe.dispatch import exchange
from switchmoe.model import choices
from switchmoe.model.attention import attention_inits, projections
from switchmoe.model.layers import FeedForward, Initializer, activate, kernel_init, param
from switchmoe.model.moe_rules import check, dispatch_name, expert_width, router_columns, router_name, slots
from switchmoe.quantised import SCALE, Quantised, shapes
from switchmoe.routing import GROUPS, ROUTERS, RouterSettings, Routing
from switchmoe.settings import LOSS_WEIGHTS, ModelSettings, MoESettings

Matmul = Callable[
    [jax.Array, jax.Array | Quantised], jax.Array
]  # a dispatcher's: rows times their experts' kernels
ON_DISK = "on_disk"  # a parameter in place of a layer's experts: `inference.offload.shelf.Shelf`
Kernels = Mapping[str, Any] | None  # of experts that are not parameters, by name


def expert_kernel(
    module: nn.Module,
    name: str,
    init: Initializer,
    names: tuple[str, ...],
    shape: tuple[int, ...],
    dtype: jnp.dtype,
) -> jax.Array | Quantised:
    """A parameter [E, D, ...] as kernels [E, D, F]; with `moe.expert_bits` two, integers and their scales."""
    moe = module.moe
    if not moe.expert_bits:
        return param(module, name, init, names, shape, dtype).reshape(*shape[:2], -1)
    kernel = *shape[:2], math.prod(shape[2:])
    codes, scales = shapes(kernel, moe.expert_bits, moe.expert_group)
    zeros, ones = nn.initializers.zeros, nn.initializers.ones
    return Quantised(
        param(module, name, zeros, names[:3], codes, jnp.int8, jnp.int8),
        param(module, name + SCALE, ones, (names[0], None, names[2]), scales, jnp.float32),
        moe.expert_bits,
        dtype,
    )


class Experts(nn.Module):
    """E feed-forwards side by side: ``wo(activation(wi(x)))``, each row by its own expert."""

    model: ModelSettings
    moe: MoESettings
    train: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, matmul: Matmul, kernels: Kernels = None) -> jax.Array:
        experts, d, f = self.moe.total_experts, self.model.d_model, expert_width(self.model, self.moe)
        # batch_axis: fan-in is that of one expert, whatever their number.
        init = kernel_init(self.model.init_scale, in_axis=1, out_axis=2, batch_axis=0)
        names = ("expert", "embed", "mlp")

        def kernel(name: str, names: tuple[str, ...], shape: tuple[int, ...]) -> Any:
            return kernels[name] if kernels else expert_kernel(self, name, init, names, shape, x.dtype)

        def up(name: str) -> jax.Array:
            return matmul(x, kernel(name, names, (experts, d, f)))

        h = activate(self.model.activation, up)
        h = nn.Dropout(self.moe.expert_dropout_rate, deterministic=not self.train)(h)
        return matmul(h, kernel("wo", ("expert", "mlp", "embed"), (experts, f, d)))


class AttentionExperts(nn.Module):
    """E sets of query, key and value projections; rows come out as the three side by side."""

    model: ModelSettings
    moe: MoESettings
    train: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, matmul: Matmul, kernels: Kernels = None) -> jax.Array:
        experts, inits = self.moe.total_experts, attention_inits(self.model, batch_axis=0)
        names = ("expert", "embed", "heads", "kv")
        own = [
            kernels[name]
            if kernels
            else expert_kernel(self, name, inits[name], names, (experts, *shape), x.dtype)
            for name, shape in projections(self.model).items()
        ]
        return jnp.concatenate([matmul(x, kernel) for kernel in own], axis=-1)


class MoELayer(nn.Module):
    """Routes each token of a group to experts and back.

    ``experts`` makes the module of the experts: `Experts` or `AttentionExperts`. In a ``causal`` layer
    the router is ``moe.decoder_router``, ``moe.priority`` and ``moe.reroute`` are off, and slots are
    given token by token. Randomness: streams ``router`` (jitter, noise, sampling) and ``dropout``, in
    training only.
    """

    model: ModelSettings
    moe: MoESettings
    train: bool = False
    causal: bool = False
    experts: Callable[..., nn.Module] = Experts
    trace: bool = False

    @nn.compact
    def __call__(
        self, x_GSD: jax.Array, mask_GS: jax.Array | None = None, ids_GS: jax.Array | None = None
    ) -> tuple[jax.Array, dict]:
        """Returns (y_GSD, aux).

        A token's y is the sum over its choices of gate * expert(x), and of its shared experts; without
        these it is 0 if the token is padding or found no slot: the residual around the layer carries it.
        Where x is not finite, y is NaN (0 for padding), and nothing else is touched by that token: it is routed
        as zeros, and gives no gradient to router and experts.

        Args:
          x_GSD: tokens in groups (see `group_shape`).
          mask_GS: True where the token is real; None: everywhere.
          ids_GS: token ids, which only the router hash reads.

        aux (float32), each the mean over groups weighted by their real tokens: ``loss``, the weighted
        sum of the router's losses that is to be added to the model's; ``balance_loss`` (of
        noisy_top_k: importance + load) and ``z_loss``, without weights, 0 where the router has none;
        ``fraction_dropped``; ``router_entropy`` (nats); ``expert_load`` [E], each expert's share of
        the choices. With ``trace`` also ``trace``: `choices.told` of each token.

        Raises:
          ValueError: settings that do not go together, see `check`.
        """
        check(self.moe, self.causal)
        if mask_GS is None:
            mask_GS = jnp.ones(x_GSD.shape[:2], bool)
        good_GS1 = jnp.isfinite(x_GSD).all(axis=-1, keepdims=True)
        x_GSD = jnp.where(good_GS1, x_GSD, 0)
        routing = self._route(x_GSD, mask_GS, ids_GS)
        dispatcher = exchange.dispatcher(dispatch_name(self.moe, self.causal), routing)
        experts = self.experts(self.model, self.moe, self.train, name="experts")
        rows, kernels = _by_expert(dispatcher.dispatch(x_GSD)), None
        if self.has_variable("params", ON_DISK):
            shelf = self.get_variable("params", ON_DISK)
            dispatcher, kernels = shelf.at_hand(dispatcher, rows, x_GSD, mask_GS)
        y = _by_expert(experts(rows, dispatcher.matmul, kernels))
        y_GSD = nn.with_logical_constraint(dispatcher.combine(y), ("group", None, None))
        if self.moe.num_shared and self.experts is Experts:
            # Side by side, the shared experts are one feed-forward of all their widths.
            width = self.moe.num_shared * expert_width(self.model, self.moe)
            shared_GSD = FeedForward(self.model, self.train, width, name="shared")(x_GSD)
            if self.moe.shared_gate:
                shared_GSD *= self._shared_gate(x_GSD)
            y_GSD += shared_GSD
        bad_GS1 = jnp.where(mask_GS, jnp.nan, 0.0).astype(y_GSD.dtype)[..., None]
        return jnp.where(good_GS1, y_GSD, bad_GS1), self._aux(routing) | (
            {"trace": choices.told(routing)} if self.trace else {}
        )

    def _route(self, x_GSD: jax.Array, mask_GS: jax.Array, ids_GS: jax.Array | None) -> Routing:
        moe, name, tokens = self.moe, router_name(self.moe, self.causal), x_GSD.shape[1]
        factor = moe.capacity_factor if self.train else moe.eval_capacity_factor
        capacity = slots(moe, tokens, factor)
        settings = RouterSettings(
            capacity=moe.slots if name == "soft" else tokens if moe.dropless else capacity,
            choices=moe.total_choices,
            renormalize=moe.renormalize,
            threshold=moe.choice_threshold,
            explore=moe.explore,
            causal=self.causal,
            priority=moe.priority and not self.causal,
            reroute=0 if self.causal else moe.reroute,
            score=moe.score,
            num_experts=moe.total_experts,
            branches=moe.branches,
            balance_choices=moe.balance_choices,
            balance_axis=GROUPS if moe.balance == "global" else None,
        )
        if name == "hash":
            if ids_GS is None:
                raise ValueError("moe.router=hash: accepted is a call with token ids (ids_GS)")
            scores = ids_GS
        else:
            scores = self._scores(self._explore(x_GSD.astype(moe.router_dtype)))
        draws = self.train and (
            name in ("noisy_top_k", "sinkhorn") or moe.explore == "sample" or moe.choice_threshold
        )
        keys_G = jax.random.split(self.make_rng("router"), len(x_GSD)) if draws else None
        route = functools.partial(ROUTERS[name], settings=settings)
        routing = jax.vmap(route, (0, 0, None if keys_G is None else 0), axis_name=GROUPS)(
            scores, mask_GS, keys_G
        )
        gate_GSK = routing.gate_SK.astype(jnp.float32)
        if moe.unit_gates:
            total_GS1 = jax.lax.stop_gradient(gate_GSK.sum(axis=-1, keepdims=True))
            gate_GSK /= jnp.where(total_GS1 > 0, total_GS1, 1.0)
        return routing.replace(gate_SK=gate_GSK)

    def _explore(self, x_GSD: jax.Array) -> jax.Array:
        """The router's input in training; the experts' is never touched."""
        moe = self.moe
        if self.train and moe.explore == "jitter" and moe.jitter:
            key, low, high = self.make_rng("router"), 1 - moe.jitter, 1 + moe.jitter
            x_GSD *= jax.random.uniform(key, x_GSD.shape, x_GSD.dtype, low, high)
        if moe.explore == "input_dropout":
            x_GSD = nn.Dropout(moe.input_dropout_rate, rng_collection="router")(x_GSD, not self.train)
        return x_GSD

    def _scores(self, x_GSD: jax.Array) -> jax.Array:
        """What the router reads; selective precision: input, kernel and all that follows are float32.

        With ``moe.router_dtype=bfloat16`` they are that, the softmax and the gates as well.
        """
        moe, name = self.moe, router_name(self.moe, self.causal)
        init = nn.initializers.normal(moe.router_init_stddev)
        if name == "noisy_top_k":
            init = nn.initializers.zeros
        shape = (x_GSD.shape[-1], router_columns(moe, name))
        kernel_DE = param(self, "router", init, ("embed", None), shape, x_GSD.dtype)
        logits_GSE = jnp.einsum("GSD,DE->GSE", x_GSD, kernel_DE, precision=jax.lax.Precision.HIGHEST)
        if name == "loss_free":
            bias_E = param(
                self, "router_bias", nn.initializers.zeros, (None,), (moe.total_experts,), jnp.float32
            )
            bias_GSE = jnp.broadcast_to(bias_E.astype(logits_GSE.dtype), logits_GSE.shape)
            logits_GSE = jnp.concatenate([logits_GSE, bias_GSE], axis=-1)
        return logits_GSE

    def _shared_gate(self, x_GSD: jax.Array) -> jax.Array:
        init = kernel_init(self.model.init_scale, in_axis=0, out_axis=1)
        kernel_D1 = param(self, "shared_gate", init, ("embed", None), (x_GSD.shape[-1], 1), x_GSD.dtype)
        return jax.nn.sigmoid(jnp.einsum("GSD,DO->GSO", x_GSD, kernel_D1))

    def _aux(self, routing: Routing) -> dict[str, jax.Array]:
        weight_G = routing.tokens / jnp.maximum(routing.tokens.sum(), 1.0)

        def mean(value: jax.Array) -> jax.Array:
            return jnp.einsum("G,G...->...", weight_G, value)

        lost = {name: mean(value_G) for name, value_G in routing.losses.items()}
        zero = jnp.zeros(())
        # The pull on loss_free's bias has no weight: only its sign counts.
        weights = {name: getattr(self.moe, field) for name, field in LOSS_WEIGHTS.items()} | {"bias": 1.0}
        return {
            "loss": sum((weights[name] * value for name, value in lost.items()), zero),
            "balance_loss": sum((lost.get(name, zero) for name in ("balance", "importance", "load")), zero),
            "z_loss": lost.get("z", zero),
            "fraction_dropped": mean(routing.fraction_dropped),
            "router_entropy": mean(routing.entropy),
            "expert_load": mean(routing.load_E),
        }


def _by_expert(x: jax.Array) -> jax.Array:
    """The sharding of the experts' buffers; rows that are not in buffers are left as they are."""
    return nn.with_logical_constraint(x, ("expert", "expert_group", None, None)) if x.ndim == 4 else x
