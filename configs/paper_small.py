"""The paper's claims on one GPU: the base of their runs, and all runs as one sweep (`experiments.claims`).

    python -m experiments.paper table1 table2 table3 table11 figure4 figure5 figure6 figure12 --scale=small \\
      --config.data.source='text/*.txt.xz' --config.data.documents=block
    python -m experiments.sweep --config=configs/paper_small.py --dry_run    # every run of every claim

The model, text, batch and steps of `sweeps/experts_small` (22.7 M parameters dense, bfloat16, 51 M tokens a run), with 32
experts and without the z-loss, which is ST-MoE's. Not run here.
"""

from ml_collections import ConfigDict

from configs.sweeps import experts_small


def get_config() -> ConfigDict:
    config = experts_small.get_config()
    config.moe.update(num_experts=32, z_loss_weight=0.0)
    config.train.update(eval_every=40)
    return config


def get_sweep() -> list[dict[str, list]]:
    from experiments import claims  # here, as a run has no need of it

    return claims.products("small")
