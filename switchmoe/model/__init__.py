"""The model: T5's layers, the MoE layer, the encoder-decoder's stacks, and the vocabulary's loss.

Flax modules without flags, files or mesh axes: parameters and activations carry logical axis names ("embed", "mlp",
"expert", ...), which `parallel` maps to devices. A layer that routes returns ``(y, aux)``; ``aux`` holds its losses and
metrics, which the stacks collect along an axis of layers. `transformer.Transformer` takes token ids ``inputs_BL`` and
``targets_BL`` (B sequences of L tokens, 0 is padding) to logits ``[B, L, V]`` or to each target's loss.

To add a layer: a module here that names its axes, and a test of what it must not change (padding, the future).
"""
