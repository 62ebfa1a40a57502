"""The paper's sweep: T5-Base with 2 to 256 experts in every other layer, on C4 (Switch Transformers, 2101.03961, 3.1).

    python -m experiments.sweep --config=configs/sweeps/experts_base.py --config.data.vocab=/path/to/spiece.model \\
      --config.data.data_dir=gs://bucket/tfds --config.mesh.layout=data_expert

Figure 4: held-out loss falls with each doubling from E = 1 to 256 at the FLOPs per token of T5-Base, and with 64
experts is at step 60,000 what T5-Base's is at 450,000. All runs have 2**20 input tokens a step, t5_base's optimizer
and groups of 4,096 tokens: of the encoder 16 for each of 256 experts and 20 slots, of the decoder (32 sequences, 3,648
tokens) 14 and 18. The z-loss is off, as it is ST-MoE's.

524,288 steps of 1.28 M tokens, 8.7e14 FLOPs each. Not run here: it needs a pod, and a local sweep runs one run
after the other on the devices of one host, so this is the definition of the study more than a command to type.
"""

from ml_collections import ConfigDict

from configs import t5_base


def get_config() -> ConfigDict:
    config = t5_base.get_config()
    config.moe.update(eval_group_size=4096, z_loss_weight=0.0)
    return config


def get_sweep() -> list[dict[str, list]]:
    return [{"moe.num_experts": [2**n for n in range(9)]}]
