"""T5 encoder-decoder with sparse feed-forwards, as the Switch Transformer; or a decoder alone, of the same blocks.

A stack is a scan over super-blocks of ``moe.every`` blocks, one of them sparse; a dense stack is a scan over single
blocks. Compile time does not grow with depth, and a stack's parameters carry a leading layer axis. With
``model.scan=False`` it is a loop, each super-block with parameters of its own; decoding needs that (`unstacked`).

Letters: B batch, L length, D model, V vocabulary rows, H heads, M the encoder's length or slots of a memory.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from switchmoe.model import output_loss, seen
from switchmoe.model.attention import Attention, KeysValues, Memory, RelativeBias, filled
from switchmoe.model.layers import FeedForward, RMSNorm, dropout, param
from switchmoe.model.moe import AttentionExperts, Experts, MoELayer
from switchmoe.model.moe_rules import group_shape
from switchmoe.products import argmax
from switchmoe.settings import MoESettings, Settings

PAD_ID = 0
Kept = dict[str, KeysValues]


class Block(nn.Module):
    """Self-attention, cross-attention where there is an encoder, feed-forward or experts; pre-norm residuals."""

    settings: Settings
    stack: str
    sparse: bool
    train: bool
    trace: bool = False

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, context: dict, memory: Kept | None = None
    ) -> tuple[jax.Array, dict, Kept]:
        """Returns (x_BLD, aux, what it attended to), aux along an axis of the block's MoE layers, {} in a dense block.

        ``context`` is `Stack`'s.
        """
        model, kept = self.settings.model, {}

        def dropped(y_BLD: jax.Array) -> jax.Array:
            return dropout(model, self.train)(y_BLD)

        def norm(name: str, x_BLD: jax.Array) -> jax.Array:
            return RMSNorm(model.norm_eps, name=name)(x_BLD)

        aux = []
        normed_BLD = norm("self_norm", x_BLD)
        projected = None
        if self.sparse and self.settings.moe.attention:
            projected = self._experts(normed_BLD, context, aux, "self_moe", AttentionExperts)
        before = (memory["self"], context["used"]) if memory else (None, None)
        parts = (normed_BLD, normed_BLD, context["self"], projected, context.get("rotary"), *before)
        y_BLD, kept["self"] = Attention(model, self.train, name="self")(*parts)
        x_BLD += dropped(y_BLD)
        if "cross" in context:
            before = (memory or {}).get("cross")
            attend = Attention(model, self.train, name="cross")
            parts = (norm("cross_norm", x_BLD), context["encoded"], context["cross"])
            y_BLD, kept["cross"] = attend(*parts, memory=before)
            x_BLD += dropped(y_BLD)
        normed_BLD = norm("ff_norm", x_BLD)
        if self.sparse:
            y_BLD = self._experts(normed_BLD, context, aux, "moe", Experts)
        else:
            y_BLD = FeedForward(model, self.train, name="ff")(normed_BLD)
        stacked = jax.tree.map(lambda *values: jnp.stack(values), *aux) if aux else {}
        return x_BLD + dropped(y_BLD), stacked, kept

    def _experts(
        self, x_BLD: jax.Array, context: dict, aux: list[dict], name: str, experts: type[nn.Module]
    ) -> jax.Array:
        """A `MoELayer`, whose aux is appended to ``aux``."""
        moe, mask_BL = self.settings.moe, context["mask"]
        if not (self.train or moe.eval_group_size) and self.settings.stacks == ("decoder",):
            moe = without_limits(moe)
        if moe.route_padding and self.stack == "encoder":
            mask_BL = jnp.ones_like(mask_BL)
        groups = group_shape(*mask_BL.shape, moe.group_size if self.train else moe.eval_group_size)
        causal = self.stack == "decoder"
        layer = MoELayer(self.settings.model, moe, self.train, causal, experts, self.trace, name=name)
        parts = (x_BLD.reshape(*groups, -1), mask_BL.reshape(groups), context["ids"].reshape(groups))
        y_GSD, layer_aux = layer(*parts)
        if self.trace:
            told = layer_aux["trace"]
            layer_aux["trace"] = jax.tree.map(lambda v: v.reshape(*mask_BL.shape, *v.shape[2:]), told)
        aux.append(layer_aux)
        return y_GSD.reshape(*mask_BL.shape, -1)


def without_limits(moe: MoESettings) -> MoESettings:
    """With these no token is dropped, so that one's output does not depend on what is beside it."""
    # Where there are none already, the back end stays as it was chosen: decoding has its own.
    return moe if moe.dropless else dataclasses.replace(moe, dropless=True, dispatch="ragged")


class SuperBlock(nn.Module):
    """What a stack repeats: dense blocks and one sparse block, or a dense block alone.

    Returns (x_BLD, aux), and where it is given memories (x_BLD, (aux, what each block attended to)).
    """

    settings: Settings
    stack: str
    train: bool
    trace: bool = False

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, context: dict, memories: tuple[Kept, ...] = ()
    ) -> tuple[jax.Array, Any]:
        settings, aux, kept = self.settings, {}, []
        for i in range(settings.period(self.stack)):
            sparse = i + settings.first(self.stack) in settings.sparse_blocks(self.stack)
            block = Block(settings, self.stack, sparse, self.train, self.trace, name=f"block_{i}")
            x_BLD, own_aux, own = block(x_BLD, context, memories[i] if memories else None)
            aux |= own_aux
            kept.append(own)
        return x_BLD, (aux, tuple(kept)) if memories else aux


def sparse_layer_names(settings: Settings) -> list[str]:
    """``encoder/1``, ..., ``decoder/1``, ...: the order in which per-layer metrics are listed."""
    parts = ("/attention", "") if settings.moe.attention else ("",)
    return [
        f"{stack}/{block}{part}"
        for stack in settings.stacks
        for block in settings.sparse_blocks(stack)
        for part in parts
    ]


class Stack(nn.Module):
    """Encoder or decoder: blocks, then a last norm."""

    settings: Settings
    stack: str  # encoder | decoder
    train: bool
    trace: bool = False

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        mask_BL: jax.Array,
        ids_BL: jax.Array,
        encoded: tuple[jax.Array, jax.Array] | None = None,
        segment_BL: jax.Array | None = None,
        position_BL: jax.Array | None = None,
        memory: Memory | None = None,
        encoded_segment_BM: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Args: embeddings; True where a token is real; token ids; the encoder's output and its mask; which document of
        its row a token is of, none of which sees another; its place there; what was read before; which document the
        encoder's tokens are of.

        Returns (x_BLD, aux), aux with the values of `MoELayer`'s along a leading layer axis; with a memory (x_BLD, the
        memory with these tokens in it).
        """
        model = self.settings.model
        context = {"mask": mask_BL, "ids": ids_BL}
        if memory is None:
            own, distance = self._seen(mask_BL, segment_BL)
            place_BL = jnp.arange(x_BLD.shape[1])[None] if position_BL is None else position_BL
        else:
            slots_BM = filled(memory.position_BM, position_BL, memory.used, axis=1)
            memory = memory.replace(position_BM=slots_BM)
            own, distance = seen.remembered(slots_BM, position_BL)
            place_BL, context["used"] = position_BL, memory.used
        if model.positions == "rotary":
            context["rotary"] = place_BL
        else:
            bias = RelativeBias(model, bidirectional=self.stack == "encoder", name="relative_bias")(distance)
            own = own.replace(bias=bias)
        context["self"] = own
        real_BM = None if encoded is None else encoded[1]
        if memory is not None and real_BM is None:
            real_BM = memory.encoded_BM
        if real_BM is not None:
            context["encoded"] = None if encoded is None else encoded[0]
            context["cross"] = seen.real(real_BM, segment_BL, encoded_segment_BM)
        dropped = dropout(model, self.train)
        x_BLD, found = self._blocks(dropped(x_BLD), context, memory)
        x_BLD = dropped(RMSNorm(model.norm_eps, name="norm")(x_BLD))
        if memory is None:
            return x_BLD, jax.tree.map(lambda value: value.reshape(-1, *value.shape[2:]), found)
        used, (blocks, told) = memory.used + position_BL.shape[1], found
        return x_BLD, memory.replace(blocks=blocks, used=used, encoded_BM=real_BM, told=told)

    def _seen(self, mask_BL: jax.Array, segment_BL: jax.Array | None) -> tuple[seen.Seen, jax.Array]:
        """(which keys each query sees, key minus query)."""
        place_L = jnp.arange(mask_BL.shape[1])
        distance_LL = place_L[None, :] - place_L[:, None]
        if self.stack == "encoder":
            return seen.real(mask_BL, segment_BL, segment_BL), distance_LL
        return seen.not_later(distance_LL, segment_BL), distance_LL

    def _blocks(self, x_BLD: jax.Array, context: dict, memory: Memory | None) -> tuple[jax.Array, Any]:
        """(x_BLD, aux along an axis of super-blocks), or (x_BLD, (what each block attended to, the trace if there is one))."""
        model, period, repeats = (
            self.settings.model,
            self.settings.period(self.stack),
            self.settings.repeats(self.stack),
        )
        if model.scan and memory is not None:
            raise ValueError("model.scan=True: accepted with a memory is False, see `unstacked`")
        first, memories = self.settings.first(self.stack), () if memory is None else memory.blocks
        firsts = []
        for i in range(first):
            dense = nn.remat(Block) if model.remat else Block
            x_BLD, _, own = dense(self.settings, self.stack, False, self.train, name=f"first_{i}")(
                x_BLD, context, memories[i] if memories else None
            )
            firsts.append(own)
        block = nn.remat(SuperBlock, prevent_cse=not model.scan) if model.remat else SuperBlock
        if model.scan:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True, "router": True},
                in_axes=nn.broadcast,
                length=repeats,
                unroll=model.scan_unroll,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return scanned(self.settings, self.stack, self.train, self.trace, name="blocks")(x_BLD, context)
        found = []
        for i in range(repeats):
            own = (memories[first + i * period : first + (i + 1) * period],) if memory is not None else ()
            name = f"blocks_{i}"
            x_BLD, part = block(self.settings, self.stack, self.train, self.trace, name=name)(
                x_BLD, context, *own
            )
            found.append(part)
        if memory is not None:
            traces = [aux["trace"] for aux, _ in found if "trace" in aux]
            told = jax.tree.map(lambda *values: jnp.concatenate(values), *traces) if traces else None
            return x_BLD, ((*firsts, *(kept for _, part in found for kept in part)), told)
        return x_BLD, jax.tree.map(lambda *values: jnp.stack(values), *found)


class Transformer(nn.Module):
    """Encoder-decoder, or a decoder alone (`model.stacks`). Randomness in training: streams ``dropout`` and ``router``."""

    settings: Settings
    train: bool = False
    trace: bool = False  # aux tells what each token chose

    def setup(self) -> None:
        model = self.settings.model
        rows = (self.settings.embedding_rows, model.d_model)
        init = nn.initializers.normal(1.0)
        self.embedding_VD = param(self, "embedding", init, ("vocab", "embed"), rows, jnp.float32)
        if not model.tie_embeddings:
            init = nn.initializers.normal(model.d_model**-0.5)
            self.output_VD = param(self, "output", init, ("vocab", "embed"), rows, jnp.float32)
        if "encoder" in self.settings.stacks:
            self.encoder = Stack(self.settings, "encoder", self.train, self.trace)
        self.decoder = Stack(self.settings, "decoder", self.train, self.trace)

    def __call__(
        self,
        inputs_BL: jax.Array | None,
        targets_BL: jax.Array,
        segment_BL: jax.Array | None = None,
        position_BL: jax.Array | None = None,
        input_segment_BL: jax.Array | None = None,
    ) -> tuple[jax.Array, dict]:
        """Teacher-forced logits of the targets.

        Args:
          inputs_BL: encoder tokens, then 0; None for a decoder alone.
          targets_BL: decoder targets, 0 where padded; the decoder reads them shifted right by one, `data.bos_id` first.
          segment_BL: the number of each target's document in its row, from 1; None: one a row.
          position_BL: and its place there, from 0.
          input_segment_BL: the same numbers of the inputs.

        Returns:
          (logits_BLV, aux): float32 logits; aux maps each stack to its `Stack`'s aux.
        """
        x_BLD, aux = self._teacher_forced(inputs_BL, targets_BL, segment_BL, position_BL, input_segment_BL)
        return self.logits(x_BLD), aux

    def token_losses(
        self, batch: dict[str, jax.Array], label_smoothing: float = 0.0
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array, jax.Array], dict]:
        """`output_loss.output_cross_entropy` of a batch's teacher-forced targets, with ``loss`` of those that are to be
        predicted, and ``aux`` as of a call. With ``encoded``, what `encode` gave, the inputs are not read again.
        """
        x_BLD, aux = self._read_batch(batch)
        table_VD, targets_BL = self._output_table().astype(x_BLD.dtype), batch["targets"]
        if "loss" not in batch:
            return output_loss.output_cross_entropy(x_BLD, table_VD, targets_BL, label_smoothing), aux
        most = self.settings.data.most_predicted(targets_BL.shape[1])
        given = x_BLD, table_VD, targets_BL, batch["loss"], most, label_smoothing
        return output_loss.some_cross_entropy(*given), aux

    def batch_logits(self, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict]:
        """(logits_BLV, aux) of a batch's teacher-forced targets, as of a call."""
        x_BLD, aux = self._read_batch(batch)
        return self.logits(x_BLD), aux

    def predictions(self, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict]:
        """(the likeliest token at each of a batch's teacher-forced targets, int32 [B, L]; ``aux`` as of a call)."""
        logits_BLV, aux = self.batch_logits(batch)
        return argmax(logits_BLV), aux

    def _read_batch(self, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict]:
        packed = batch.get("segments"), batch.get("positions"), batch.get("input_segments")
        return self._teacher_forced(batch.get("inputs"), batch["targets"], *packed, batch.get("encoded"))

    def encode(self, inputs_BL: jax.Array, segment_BL: jax.Array | None = None) -> tuple[jax.Array, dict]:
        return self.encoder(self._embed(inputs_BL), inputs_BL != PAD_ID, inputs_BL, None, segment_BL)

    def read(
        self,
        ids_BL: jax.Array,
        position_BL: jax.Array,
        memory: Memory,
        encoded: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, Memory]:
        """What predicts the token after each of these (`logits` of it), and the memory with them in it.

        Args:
          ids_BL: the decoder's next tokens; an encoder-decoder's first is `data.bos_id`.
          position_BL: their places in their sequences, -1 where there is none.
          memory: `empty_memory` at first, with slots for all that will be read.
          encoded: the encoder's output and which of it is real, at first alone.
        """
        x_BLD, memory = self.decoder(
            self._embed(ids_BL), position_BL >= 0, ids_BL, encoded, None, position_BL, memory
        )
        return self._scaled(x_BLD), memory

    def logits(self, x_BLD: jax.Array) -> jax.Array:
        """Float32 logits [..., V] of the decoder's output."""
        return output_loss.logits(x_BLD, self._output_table().astype(x_BLD.dtype))

    def _teacher_forced(
        self,
        inputs_BL: jax.Array | None,
        targets_BL: jax.Array,
        segment_BL: jax.Array | None,
        position_BL: jax.Array | None,
        input_segment_BL: jax.Array | None,
        encoded_BMD: jax.Array | None = None,
    ) -> tuple[jax.Array, dict]:
        first = self.settings.data.bos_id
        shifted_BL = jnp.pad(targets_BL[:, :-1], ((0, 0), (1, 0)), constant_values=first)
        if position_BL is not None:
            shifted_BL = jnp.where(position_BL == 0, first, shifted_BL)
        embedded_BLD, mask_BL = self._embed(shifted_BL), targets_BL != PAD_ID
        if inputs_BL is None:
            x_BLD, aux = self.decoder(embedded_BLD, mask_BL, shifted_BL, None, segment_BL, position_BL)
            return self._scaled(x_BLD), {"decoder": aux}
        aux = {}
        if encoded_BMD is None:
            encoded_BMD, aux["encoder"] = self.encode(inputs_BL, input_segment_BL)
        encoded = encoded_BMD, inputs_BL != PAD_ID
        places = segment_BL, position_BL, None, input_segment_BL
        x_BLD, aux["decoder"] = self.decoder(embedded_BLD, mask_BL, shifted_BL, encoded, *places)
        return self._scaled(x_BLD), aux

    def _scaled(self, x_BLD: jax.Array) -> jax.Array:
        model = self.settings.model
        return x_BLD * model.d_model**-0.5 if model.tie_embeddings and model.scale_logits else x_BLD

    def _output_table(self) -> jax.Array:
        return self.embedding_VD if self.settings.model.tie_embeddings else self.output_VD

    def _embed(self, tokens_BL: jax.Array) -> jax.Array:
        return self.embedding_VD.astype(self.settings.model.dtype)[tokens_BL]


def example_tokens(settings: Settings) -> tuple[jax.Array | None, jax.Array]:
    """The smallest arguments of a `Transformer`, to make its parameters with."""
    tokens_BL = jnp.zeros((1, 8), jnp.int32)
    return (tokens_BL if "encoder" in settings.stacks else None), tokens_BL


def unstacked(settings: Settings, params: dict) -> tuple[Settings, dict]:
    """(the settings, the parameters) of the same model without the scan."""
    if not settings.model.scan:
        return settings, params
    loop = dataclasses.replace(settings, model=dataclasses.replace(settings.model, scan=False, remat=False))
    found = dict(params)
    for stack in settings.stacks:
        rest = {name: value for name, value in params[stack].items() if name != "blocks"}
        blocks = params[stack]["blocks"]
        parts = (jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(settings.repeats(stack)))
        found[stack] = rest | {f"blocks_{i}": part for i, part in enumerate(parts)}
    return loop, found
