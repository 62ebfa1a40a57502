"""Qwen3-30B-A3B (2505.09388): 30.5 B parameters, 3.3 B for a token.

48 layers of width 2048, all sparse: 128 experts (SwiGLU, 768 wide), the 8 best of each token with renormalised gates. 32
heads of 128 (so twice the model's width), 4 of keys and values; queries and keys are normed head by head; rotary positions
with theta 1e6. Its balance loss is taken over the whole batch (2501.11873); with `train.accumulate` over a microbatch.

    python -m experiments.plan --config=configs/qwen3_30b_a3b.py --devices=64 --layout=data_expert
    python -m experiments.run --config=configs/qwen3_30b_a3b.py --config.data.source=c4/en

Not run here: it needs accelerators.
"""

from ml_collections import ConfigDict

from configs import mixtral_8x7b


def get_config() -> ConfigDict:
    config = mixtral_8x7b.decoder()
    config.model.update(d_model=2048, d_ff=768, d_kv=128, num_heads=32, num_kv_heads=4, num_layers=48)
    config.model.update(norm_eps=1e-6, rotary_theta=1e6, qk_norm="head")
    config.moe.update(
        num_experts=128, choices=8, balance="global", balance_loss_weight=1e-3, z_loss_weight=0.0
    )
    config.data.update(
        vocab_size=151836, batch_size=512, input_length=4096
    )  # and 100 sentinels: 151,936 rows
    return config
