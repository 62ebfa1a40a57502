"""Switch-Large of Switch Transformers (2101.03961): T5-Large with 128 experts, 26.3B parameters.

`:geglu` takes the feed-forward that Table 9 prints (27.1B parameters); see t5_large for why it is not the
default.

    python -m experiments.run --config=configs/switch_large.py --config.data.vocab=/path/to/spiece.model

The paper reports 1.248 nats on C4 after 250k steps, 1.177 after 500k. Not run here: it needs a pod.
"""

from ml_collections import ConfigDict

from configs import t5_large


def get_config(variant: str = "relu") -> ConfigDict:
    config = t5_large.get_config(variant)
    config.moe.update(num_experts=128, every=2, z_loss_weight=0.0)
    config.moe.eval_group_size = config.moe.group_size  # one sequence has too few tokens for the experts
    return config
