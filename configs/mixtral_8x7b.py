"""Mixtral 8x7B (2401.04088): 46.7 B parameters, 12.9 B for a token.

32 layers of width 4096, all sparse: 8 experts (SwiGLU, 14,336 wide), the 2 best of each token with renormalised gates. 32
heads, 8 of keys and values; rotary positions with theta 1e6. Trained without capacity here, as it is used.

    python -m experiments.plan --config=configs/mixtral_8x7b.py --devices=64 --layout=data_expert \\
      --config.mesh.data=8 --config.mesh.expert=8
    python -m experiments.run --config=configs/mixtral_8x7b.py --config.data.source=c4/en

Not run here: its state alone is a pod's.
"""

from ml_collections import ConfigDict

from switchmoe.settings import default_config


def get_config() -> ConfigDict:
    config = decoder()
    config.model.update(d_model=4096, d_ff=14336, d_kv=128, num_heads=32, num_kv_heads=8, num_layers=32)
    config.model.update(norm_eps=1e-5, rotary_theta=1e6)
    config.moe.update(num_experts=8, choices=2, balance_loss_weight=0.02, z_loss_weight=0.0)
    config.data.update(vocab_size=31900, batch_size=128, input_length=8192)  # and 100 sentinels: 32,000 rows
    return config


def decoder() -> ConfigDict:
    """What today's decoder-only mixtures have in common."""
    config = default_config()
    config.model.update(stacks="decoder_only", activation="swiglu", positions="rotary", attention_scale=0.0)
    config.model.update(tie_embeddings=False, init_scale=1.0, remat=True)
    config.moe.update(every=1, router="top_k", dropless=True, jitter=0.0)
    config.data.update(objective="causal_lm")
    config.optimizer.update(name="adamw", schedule="warmup_cosine", learning_rate=3e-4, warmup_steps=2000)
    config.optimizer.update(beta2=0.95, weight_decay=0.1, clip_norm=1.0)
    return config
