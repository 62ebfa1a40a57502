"""T5-Base as in Table 9 of Switch Transformers (2101.03961): the dense model that Switch-Base matches.

223M parameters; GEGLU of width 2048 costs what ReLU of width 3072 does. The pre-training settings are
those of T5X's mixture-of-experts runs and ST-MoE (2202.08906, 6): Adafactor, rate 1 / sqrt(step) after
10,000 flat steps, 512 / 114 tokens, 2**20 input tokens a step; the paper names none of them.

    python -m experiments.run --config=configs/t5_base.py --config.data.vocab=/path/to/spiece.model

The paper reports 1.599 nats on C4 after 250k steps, 1.556 after 500k. Not run here: it needs a pod.
"""

from ml_collections import ConfigDict

from switchmoe.settings import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model.update(d_model=768, d_ff=2048, d_kv=64, num_heads=12, num_layers=12, activation="geglu")
    config.moe.num_experts = 1
    config.data.update(source="c4/en", batch_size=2048, input_length=512, target_length=114, vocab_size=32000)
    config.train.update(num_steps=524288, log_every=100, eval_every=1000)
    return config
