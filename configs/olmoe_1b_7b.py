"""OLMoE-1B-7B (2409.02060): 6.92 B parameters, 1.28 B for a token.

16 layers of width 2048, all sparse: 64 experts (SwiGLU, 1,024 wide), the 8 best of each token, gates not renormalised.
16 heads of 128; queries and keys are normed over all heads' width; rotary positions. Losses as the paper's: balance 0.01,
router z 0.001.

    python -m experiments.plan --config=configs/olmoe_1b_7b.py --devices=32 --layout=data_expert
    python -m experiments.run --config=configs/olmoe_1b_7b.py --config.data.source=c4/en

Not run here: it needs accelerators.
"""

from ml_collections import ConfigDict

from configs import mixtral_8x7b


def get_config() -> ConfigDict:
    config = mixtral_8x7b.decoder()
    config.model.update(
        d_model=2048, d_ff=1024, d_kv=128, num_heads=16, num_layers=16, norm_eps=1e-5, qk_norm="all"
    )
    config.moe.update(
        num_experts=64, choices=8, renormalize=False, balance_loss_weight=1e-2, z_loss_weight=1e-3
    )
    config.data.update(vocab_size=50204, batch_size=1024, input_length=4096)  # and 100 sentinels: 50,304 rows
    config.optimizer.update(learning_rate=4e-4)
    return config
