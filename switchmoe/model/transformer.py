"""T5 encoder-decoder with sparse feed-forwards, as the Switch Transformer.

A stack is a scan over super-blocks of ``moe.every`` blocks, the last of them sparse; a dense model is
a scan over single blocks. Compile time does not grow with depth, and a stack's parameters carry a
leading layer axis. With ``model.scan=False`` it is a loop, each super-block with parameters of its own.

Letters: B batch, L length, D model, V vocabulary rows, H heads.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from switchmoe.model import output_loss
from switchmoe.model.layers import Attention, FeedForward, RelativeBias, RMSNorm, param
from switchmoe.model.moe import AttentionExperts, Experts, MoELayer, group_shape
from switchmoe.settings import Settings

PAD_ID = 0
STACKS = ("encoder", "decoder")  # in the order of per-layer metrics
MASKED = -1e9  # added to a float32 attention logit: its weight is exactly 0


class Block(nn.Module):
    """Self-attention, cross-attention in a decoder, feed-forward or experts; pre-norm residuals."""

    settings: Settings
    sparse: bool
    train: bool

    @nn.compact
    def __call__(self, x_BLD: jax.Array, context: dict) -> tuple[jax.Array, dict]:
        """Returns (x_BLD, aux), aux along an axis of the block's MoE layers, {} in a dense block.

        ``context`` is `Stack`'s.
        """
        model = self.settings.model

        def dropout(y_BLD: jax.Array) -> jax.Array:
            return nn.Dropout(model.dropout_rate, deterministic=not self.train)(y_BLD)

        aux = []
        normed_BLD = RMSNorm(name="self_norm")(x_BLD)
        projected = None
        if self.sparse and self.settings.moe.attention:
            projected = self._experts(normed_BLD, context, aux, "self_moe", AttentionExperts)
        attend = Attention(model, self.train, name="self")
        x_BLD += dropout(
            attend(normed_BLD, normed_BLD, context["self_mask"], context["self_bias"], projected)
        )
        if "encoded" in context:
            normed_BLD = RMSNorm(name="cross_norm")(x_BLD)
            attend = Attention(model, self.train, name="cross")
            x_BLD += dropout(attend(normed_BLD, context["encoded"], context["cross_mask"]))
        normed_BLD = RMSNorm(name="ff_norm")(x_BLD)
        if self.sparse:
            y_BLD = self._experts(normed_BLD, context, aux, "moe", Experts)
        else:
            y_BLD = FeedForward(model, self.train, name="ff")(normed_BLD)
        return x_BLD + dropout(y_BLD), jax.tree.map(lambda *values: jnp.stack(values), *aux) if aux else {}

    def _experts(
        self, x_BLD: jax.Array, context: dict, aux: list[dict], name: str, experts: type[nn.Module]
    ) -> jax.Array:
        """A `MoELayer`, whose aux is appended to ``aux``."""
        moe, mask_BL = self.settings.moe, context["mask"]
        groups = group_shape(*mask_BL.shape, moe.group_size if self.train else moe.eval_group_size)
        causal = "encoded" in context
        layer = MoELayer(self.settings.model, moe, self.train, causal, experts, name=name)
        parts = (x_BLD.reshape(*groups, -1), mask_BL.reshape(groups), context["ids"].reshape(groups))
        y_GSD, layer_aux = layer(*parts)
        aux.append(layer_aux)
        return y_GSD.reshape(*mask_BL.shape, -1)


class SuperBlock(nn.Module):
    """What a stack repeats: dense blocks and one sparse block, or a dense block alone."""

    settings: Settings
    train: bool

    @nn.compact
    def __call__(self, x_BLD: jax.Array, context: dict) -> tuple[jax.Array, dict]:
        aux = {}
        for i in range(blocks_per_scan(self.settings)):
            sparse = self.settings.sparse and i == self.settings.moe.every - 1
            x_BLD, aux = Block(self.settings, sparse, self.train, name=f"block_{i}")(x_BLD, context)
        return x_BLD, aux


def blocks_per_scan(settings: Settings) -> int:
    return settings.moe.every if settings.sparse else 1


def sparse_layer_names(settings: Settings) -> list[str]:
    """``encoder/1``, ..., ``decoder/1``, ...: the order in which per-layer metrics are listed."""
    if not settings.sparse:
        return []
    blocks = range(settings.moe.every - 1, settings.model.num_layers, settings.moe.every)
    parts = ("/attention", "") if settings.moe.attention else ("",)
    return [f"{stack}/{block}{part}" for stack in STACKS for block in blocks for part in parts]


class Stack(nn.Module):
    """Encoder, or decoder where ``encoded_BMD`` is given: blocks, then a last norm."""

    settings: Settings
    causal: bool
    train: bool

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        mask_BL: jax.Array,
        ids_BL: jax.Array,
        encoded_BMD: jax.Array | None = None,
        encoded_mask_BM: jax.Array | None = None,
    ) -> tuple[jax.Array, dict]:
        """Args: embeddings; True where a token is real; token ids; the encoder's output and its mask.

        Returns (x_BLD, aux), aux with the values of `MoELayer`'s along a leading layer axis.
        """
        model = self.settings.model
        length = x_BLD.shape[1]
        bias_HLL = RelativeBias(model, bidirectional=not self.causal, name="relative_bias")(length)
        if self.causal:
            # Real tokens come first, so the causal mask alone keeps padding from them.
            visible_BHLL = jnp.tril(jnp.ones((length, length), bool))[None, None]
        else:
            visible_BHLL = mask_BL[:, None, None, :]
        self_mask = jnp.where(visible_BHLL, 0.0, MASKED)
        context = {"self_bias": bias_HLL, "self_mask": self_mask, "mask": mask_BL, "ids": ids_BL}
        if encoded_BMD is not None:
            context["encoded"] = encoded_BMD
            context["cross_mask"] = jnp.where(encoded_mask_BM[:, None, None, :], 0.0, MASKED)
        dropout = nn.Dropout(model.dropout_rate, deterministic=not self.train)
        x_BLD, aux = self._blocks(dropout(x_BLD), context)
        aux = jax.tree.map(lambda value: value.reshape(-1, *value.shape[2:]), aux)
        return dropout(RMSNorm(name="norm")(x_BLD)), aux

    def _blocks(self, x_BLD: jax.Array, context: dict) -> tuple[jax.Array, dict]:
        model = self.settings.model
        block = nn.remat(SuperBlock, prevent_cse=not model.scan) if model.remat else SuperBlock
        repeats = model.num_layers // blocks_per_scan(self.settings)
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
            return scanned(self.settings, self.train, name="blocks")(x_BLD, context)
        all_aux = []
        for i in range(repeats):
            x_BLD, aux = block(self.settings, self.train, name=f"blocks_{i}")(x_BLD, context)
            all_aux.append(aux)
        return x_BLD, jax.tree.map(lambda *values: jnp.stack(values), *all_aux)


class Transformer(nn.Module):
    """Encoder-decoder. Randomness in training: streams ``dropout`` and ``router``."""

    settings: Settings
    train: bool = False

    def setup(self) -> None:
        model = self.settings.model
        rows = (self.settings.embedding_rows, model.d_model)
        init = nn.initializers.normal(1.0)
        self.embedding_VD = param(self, "embedding", init, ("vocab", "embed"), rows, jnp.float32)
        if not model.tie_embeddings:
            init = nn.initializers.normal(model.d_model**-0.5)
            self.output_VD = param(self, "output", init, ("vocab", "embed"), rows, jnp.float32)
        self.encoder = Stack(self.settings, causal=False, train=self.train)
        self.decoder = Stack(self.settings, causal=True, train=self.train)

    def __call__(self, inputs_BL: jax.Array, targets_BL: jax.Array) -> tuple[jax.Array, dict]:
        """Teacher-forced logits of the targets.

        Args:
          inputs_BL: encoder tokens, 0 where padded.
          targets_BL: decoder targets, 0 where padded; the decoder reads them shifted right by one.

        Returns:
          (logits_BLV, aux): float32 logits; aux maps ``encoder`` and ``decoder`` to `Stack`'s aux.
        """
        x_BLD, aux = self._teacher_forced(inputs_BL, targets_BL)
        return self.logits(x_BLD), aux

    def token_losses(
        self, inputs_BL: jax.Array, targets_BL: jax.Array, label_smoothing: float = 0.0
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], dict]:
        """`output_loss.output_cross_entropy` of the teacher-forced targets, and ``aux`` as of a call."""
        x_BLD, aux = self._teacher_forced(inputs_BL, targets_BL)
        table_VD = self._output_table().astype(x_BLD.dtype)
        return output_loss.output_cross_entropy(x_BLD, table_VD, targets_BL, label_smoothing), aux

    def encode(self, inputs_BL: jax.Array) -> tuple[jax.Array, dict]:
        return self.encoder(self._embed(inputs_BL), inputs_BL != PAD_ID, inputs_BL)

    def decode(
        self, encoded_BMD: jax.Array, encoded_mask_BM: jax.Array, targets_BL: jax.Array, mask_BL: jax.Array
    ) -> tuple[jax.Array, dict]:
        """What predicts each target, from those before it; ``mask_BL`` says which positions are real."""
        shifted_BL = jnp.pad(targets_BL[:, :-1], ((0, 0), (1, 0)), constant_values=PAD_ID)
        x_BLD, aux = self.decoder(self._embed(shifted_BL), mask_BL, shifted_BL, encoded_BMD, encoded_mask_BM)
        if self.settings.model.tie_embeddings:
            x_BLD *= self.settings.model.d_model**-0.5
        return x_BLD, aux

    def logits(self, x_BLD: jax.Array) -> jax.Array:
        """Float32 logits [..., V] of `decode`'s output."""
        return output_loss.logits(x_BLD, self._output_table().astype(x_BLD.dtype))

    def _teacher_forced(self, inputs_BL: jax.Array, targets_BL: jax.Array) -> tuple[jax.Array, dict]:
        encoded_BLD, encoder_aux = self.encode(inputs_BL)
        x_BLD, decoder_aux = self.decode(encoded_BLD, inputs_BL != PAD_ID, targets_BL, targets_BL != PAD_ID)
        return x_BLD, {"encoder": encoder_aux, "decoder": decoder_aux}

    def _output_table(self) -> jax.Array:
        return self.embedding_VD if self.settings.model.tie_embeddings else self.output_VD

    def _embed(self, tokens_BL: jax.Array) -> jax.Array:
        return self.embedding_VD.astype(self.settings.model.dtype)[tokens_BL]
