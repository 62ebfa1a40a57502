"""T5-XXL as in Table 9 of Switch Transformers (2101.03961): 11B parameters.

    python -m experiments.run --config=configs/t5_xxl.py --config.data.vocab=/path/to/spiece.model

The paper reports 1.147 nats on C4 after 250k steps, 1.095 after 500k. Not run here: it needs a pod.
"""

from ml_collections import ConfigDict

from configs import t5_base


def get_config() -> ConfigDict:
    config = t5_base.get_config()
    config.model.update(d_model=4096, d_ff=10240, num_heads=64, num_layers=24, remat=True)
    return config
