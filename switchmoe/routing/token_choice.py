"""Routers in which each token chooses its experts.

All of them take ``(logits_SE, mask_S, key, settings)``: float32 logits, True where the token is real, a
key in training and None in evaluation. Padding is never routed and never counted.

Letters: S tokens per group, E experts, K choices per token, N branches.
"""

import dataclasses

import jax
import jax.numpy as jnp

from switchmoe.routing import losses
from switchmoe.routing.contract import RouterSettings, Routing, chosen, token_choice


def switch(
    logits_SE: jax.Array, mask_S: jax.Array, key: jax.Array | None, settings: RouterSettings
) -> Routing:
    """Top-1 routing: p = softmax(logits), expert = argmax p, gate = p[expert] (Switch, 2.1).

    The gate is not renormalised: it is what gives the router a gradient from the task's loss.
    ``explore="sample"`` draws the expert from p in training (Switch, app. C); input dropout and input
    jitter act on the router's input and are the layer's. More choices (finer-grained experts) go as in
    `top_k`. Losses: ``balance`` and ``z``.
    """
    prob_SE = jax.nn.softmax(logits_SE, axis=-1)
    rank_SE = logits_SE
    if settings.explore == "sample" and key is not None:
        rank_SE = logits_SE + jax.random.gumbel(key, logits_SE.shape)
        key = jax.random.fold_in(key, 1)  # the threshold, if there is one, draws as well
    return _balanced(rank_SE, logits_SE, prob_SE, mask_S, key, settings)


def top_k(
    logits_SE: jax.Array, mask_S: jax.Array, key: jax.Array | None, settings: RouterSettings
) -> Routing:
    """The K best experts of p = softmax(logits), gates p[experts], with ``renormalize`` divided by their sum.

    Renormalised gates are the softmax over the K best logits alone (Mixtral, 2.1), and GShard's and
    ST-MoE's g_i / sum g. With ``threshold`` t a choice after the first is kept with probability
    min(1, gate / t) in training: t = 0.5 is GShard's ``2 g_2 > uniform`` (alg. 1), t = 0.2 ST-MoE's
    (app. G). With one choice and ``renormalize`` the gate stays p, as a constant 1 would leave the
    router without a gradient. Losses: ``z``, and ``balance`` with f the share of all K choices or, with
    ``balance_choices="first"``, of the first ones alone (GShard, alg. 1; Mesh TensorFlow). Mixtral's code has
    K times the former, and once over all layers' tokens together.
    """
    return _balanced(logits_SE, logits_SE, jax.nn.softmax(logits_SE, axis=-1), mask_S, key, settings)


def _balanced(
    rank_SE: jax.Array,
    logits_SE: jax.Array,
    prob_SE: jax.Array,
    mask_S: jax.Array,
    key: jax.Array | None,
    settings: RouterSettings,
) -> Routing:
    return token_choice(
        rank_SE,
        mask_S,
        settings,
        gate_SE=prob_SE,
        log_gate_SE=jax.nn.log_softmax(logits_SE, axis=-1),
        prob_SE=prob_SE,
        key=key,
        balance=_balance(prob_SE, rank_SE, mask_S, settings),
        z=losses.router_z(logits_SE, mask_S),
    )


def _balance(
    prob_SE: jax.Array, rank_SE: jax.Array, mask_S: jax.Array, settings: RouterSettings
) -> jax.Array:
    counted = settings.choices if settings.balance_choices == "all" else 1
    share_SE = chosen(rank_SE, counted) / counted
    return losses.load_balancing(prob_SE, share_SE, mask_S, settings.balance_axis)


def noisy_top_k(
    logits_S2E: jax.Array, mask_S: jax.Array, key: jax.Array | None, settings: RouterSettings
) -> Routing:
    """Noisy top-k gating: H = h + N(0, 1) softplus(n), gates = softmax over the K best H (2017, eq. 3-5).

    Losses: ``importance`` = CV(sum_s gates)^2 and ``load`` = CV(sum_s P)^2 (eq. 6-11), with P_si = Phi((h_si -
    kth_excluding(H_s, K, i)) / softplus(n_si)) the probability that i is chosen if its noise alone is
    drawn again; CV is the standard deviation over the mean. Without a key there is no noise, and P is
    whether i was chosen. Both kernels start at zero, so that the load starts even.

    Args:
      logits_S2E: h_SE, then n_SE.
    """
    h_SE, n_SE = jnp.split(logits_S2E, 2, axis=-1)
    k, num_experts = settings.choices, h_SE.shape[-1]
    noise_SE = jax.nn.softplus(n_SE)
    rank_SE = h_SE if key is None else h_SE + jax.random.normal(key, h_SE.shape) * noise_SE
    chosen_SE = chosen(rank_SE, k)
    open_SE = jnp.where(chosen_SE > 0, rank_SE, -jnp.inf)
    gate_SE = jax.nn.softmax(open_SE, axis=-1)
    load_SE = chosen_SE
    if key is not None and k < num_experts:
        best_SK = jax.lax.top_k(rank_SE, k + 1)[0]
        # Without i itself the K-th best is the next one, where i is among the best.
        others_SE = jnp.where(chosen_SE > 0, best_SK[:, k, None], best_SK[:, k - 1, None])
        load_SE = jax.scipy.stats.norm.cdf((h_SE - others_SE) / jnp.maximum(noise_SE, 1e-6))
    return token_choice(
        rank_SE,
        mask_S,
        settings,
        gate_SE=gate_SE,
        log_gate_SE=rank_SE - jax.nn.logsumexp(open_SE, axis=-1, keepdims=True),
        prob_SE=jax.nn.softmax(h_SE, axis=-1),
        importance=losses.squared_cv(gate_SE, mask_S, settings.balance_axis),
        load=losses.squared_cv(load_SE, mask_S, settings.balance_axis),
    )


def hierarchical(
    logits_SM: jax.Array, mask_S: jax.Array, key: jax.Array | None, settings: RouterSettings
) -> Routing:
    """Two-level mixture: the best branches, then the best experts of each (2017, app. B).

    p_ij = softmax(branch logits)_i softmax(expert logits of branch i)_j. A token takes the K1 best branches
    and the K2 best experts in each, K1 = K2 = sqrt(choices); the gates are p, renormalised with
    ``renormalize``. Losses: ``balance`` over all experts with the joint p, of all choices or the first as in
    `top_k`, and ``z`` of both levels added.

    Args:
      logits_SM: M = N + E: the branches' logits, then the experts', branch by branch.
    """
    branches = settings.branches
    per_level = round(settings.choices**0.5)
    first_SN, second_SE = logits_SM[:, :branches], logits_SM[:, branches:]
    second_SNE = second_SE.reshape(len(second_SE), branches, -1)
    prob_SNE = jax.nn.softmax(first_SN)[..., None] * jax.nn.softmax(second_SNE, axis=-1)
    open_SN = chosen(first_SN, per_level)
    open_SNE = jax.vmap(lambda logits_SE: chosen(logits_SE, per_level), in_axes=1, out_axes=1)(second_SNE)
    prob_SE = prob_SNE.reshape(second_SE.shape)
    log_SNE = jax.nn.log_softmax(first_SN)[..., None] + jax.nn.log_softmax(second_SNE, axis=-1)
    log_SE = log_SNE.reshape(second_SE.shape)
    open_SE = (open_SN[..., None] * open_SNE).reshape(second_SE.shape)
    z = losses.router_z(first_SN, mask_S) + losses.router_z(second_SNE, mask_S)
    below_S1 = 1.0 + 2.0 * (log_SE.max(axis=-1, keepdims=True) - log_SE.min(axis=-1, keepdims=True))
    rank_SE = jnp.where(open_SE > 0, log_SE, log_SE - below_S1)  # those of closed branches come last
    return token_choice(
        rank_SE,
        mask_S,
        settings,
        gate_SE=prob_SE,
        log_gate_SE=log_SE,
        prob_SE=prob_SE,
        key=key,
        balance=_balance(prob_SE, rank_SE, mask_S, settings),
        z=z,
    )


def hashed(ids_S: jax.Array, mask_S: jax.Array, key: jax.Array | None, settings: RouterSettings) -> Routing:
    """Parameter-free: the token's id decides, by a fixed random hash (Roller et al. 2021, 3.1).

    Experts are ranked by a hash of (id, expert), the finaliser of MurmurHash3; the gate of each choice
    is 1. An expert's share follows the frequencies of its ids. No losses.

    Args:
      ids_S: int32, token ids.
      settings: ``num_experts`` beside the usual.
    """
    del key
    x_SE = ids_S.astype(jnp.uint32)[:, None] * jnp.uint32(0x9E3779B9)
    x_SE = x_SE ^ (jnp.arange(settings.num_experts, dtype=jnp.uint32) * jnp.uint32(0x7FEB352D))[None, :]
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x_SE = (x_SE ^ (x_SE >> shift)) * jnp.uint32(factor)
    rank_SE = ((x_SE ^ (x_SE >> 16)) >> 8).astype(jnp.float32)  # 24 bits: exact
    settings = dataclasses.replace(settings, renormalize=False)
    prob_SE = chosen(rank_SE, settings.choices) / settings.choices
    one_SE = jnp.ones_like(rank_SE)
    return token_choice(
        rank_SE, mask_S, settings, gate_SE=one_SE, log_gate_SE=jnp.zeros_like(one_SE), prob_SE=prob_SE
    )


SINKHORN_ROUNDS = 8


def sinkhorn(
    logits_SE: jax.Array, mask_S: jax.Array, key: jax.Array | None, settings: RouterSettings
) -> Routing:
    """Balanced assignment: argmax of the entropic transport plan of exp(logits) (S-BASE, Clark et al. 2022, B.2.1).

    In training the plan's rows (real tokens) sum to 1 and its columns to tokens / E, after
    SINKHORN_ROUNDS rounds of Sinkhorn-Knopp without gradient; so a token's expert depends on its whole
    group. In evaluation the expert is the argmax of the logits, which is causal. Gate = sigmoid(logit)
    (BASE, Lewis et al. 2021). No balance loss; ``z``.
    """
    rank_SE = logits_SE
    if key is not None:
        rank_SE = jax.lax.stop_gradient(_transport(logits_SE, mask_S))
    return token_choice(
        rank_SE,
        mask_S,
        settings,
        gate_SE=jax.nn.sigmoid(logits_SE),
        log_gate_SE=jax.nn.log_sigmoid(logits_SE),
        prob_SE=jax.nn.softmax(logits_SE, axis=-1),
        z=losses.router_z(logits_SE, mask_S),
    )


def _transport(logits_SE: jax.Array, mask_S: jax.Array) -> jax.Array:
    """Log of the plan, up to a constant for each row."""
    real_S1 = mask_S[:, None]
    logits_SE = jnp.where(real_S1, logits_SE, -jnp.inf)

    def rounds(_, column_E):
        row_S1 = jax.nn.logsumexp(logits_SE - column_E[None, :], axis=-1, keepdims=True)
        return jax.nn.logsumexp(logits_SE - jnp.where(real_S1, row_S1, 0.0), axis=0)

    column_E = jax.lax.fori_loop(0, SINKHORN_ROUNDS, rounds, jnp.zeros(logits_SE.shape[-1]))
    column_E = jnp.where(jnp.isfinite(column_E), column_E, 0.0)
    return jnp.where(real_S1, logits_SE - column_E[None, :], 0.0)


def loss_free(
    logits_S2E: jax.Array, mask_S: jax.Array, key: jax.Array | None, settings: RouterSettings
) -> Routing:
    """Balance without a loss: a bias that selects but does not weigh (Wang et al. 2024; DeepSeek-V3).

    s = sigmoid(logits) or softmax(logits); experts = K best of s + b, gates s[experts], with ``renormalize``
    divided by their sum. ``bias`` is 0 in value and load_i - 1 / E in gradient with respect to b_i: the
    optimizer takes its sign, b_i += u sign(1 / E - load_i). Sigmoid scores that underflow or saturate are told
    apart by their logits while every b is 0, and by b alone afterwards. ``z``.

    Args:
      logits_S2E: logits_SE, then b_E for each token.
    """
    del key
    logits_SE, bias_SE = jnp.split(logits_S2E, 2, axis=-1)
    if settings.score == "sigmoid":
        score_SE, log_SE = jax.nn.sigmoid(logits_SE), jax.nn.log_sigmoid(logits_SE)
    else:
        score_SE, log_SE = jax.nn.softmax(logits_SE, axis=-1), jax.nn.log_softmax(logits_SE, axis=-1)
    # Scores that underflow or saturate are equal; where no bias has a say, the logits still rank them.
    rank_SE = jnp.where((bias_SE == 0).all(), logits_SE, score_SE + bias_SE)
    rank_SE = jax.lax.stop_gradient(rank_SE)
    share_SE = chosen(rank_SE, settings.choices) / settings.choices
    # The mean over real tokens of b (f - 1 / E) is sum_i b_i (f_i - 1 / E), as b is every token's.
    pull_E = losses.mean_over_tokens(share_SE, mask_S) - 1 / share_SE.shape[-1]
    bias = (losses.mean_over_tokens(bias_SE, mask_S) * jax.lax.stop_gradient(pull_E)).sum()
    return token_choice(
        rank_SE,
        mask_S,
        settings,
        gate_SE=score_SE,
        log_gate_SE=log_SE,
        prob_SE=jax.nn.softmax(logits_SE, axis=-1),
        z=losses.router_z(logits_SE, mask_S),
        bias=bias - jax.lax.stop_gradient(bias),
    )
