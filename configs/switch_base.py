"""Switch-Base as in Table 9 of Switch Transformers (2101.03961): T5-Base with 128 experts, 7.4B parameters.

`:relu` is the variant of the released checkpoints and of flaxformer: ReLU of width 3072 instead of GEGLU of
width 2048 (the same parameters per expert), no jitter, no router z-loss, groups of 8,192 tokens.
`moe.num_experts` gives the other sizes of Table 7 (16, 32, 64, 128, 256) and of the released models.

    python -m experiments.run --config=configs/switch_base.py --config.data.vocab=/path/to/spiece.model

The paper reports 1.370 nats on C4 after 250k steps, 1.306 after 500k. Not run here: it needs a pod.
"""

from ml_collections import ConfigDict

from configs import t5_base


def get_config(variant: str = "geglu") -> ConfigDict:
    if variant not in ("geglu", "relu"):
        raise ValueError(f"argument {variant}: accepted is geglu, or relu for the released variant")
    config = t5_base.get_config()
    config.moe.update(num_experts=128, every=2, z_loss_weight=0.0)
    if variant == "relu":
        config.model.update(activation="relu", d_ff=3072)
        config.moe.update(jitter=0.0, group_size=8192)
    config.moe.eval_group_size = config.moe.group_size  # one sequence has too few tokens for the experts
    return config
