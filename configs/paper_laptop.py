"""The papers' claims on a laptop's CPU overnight: `paper_tiny` with twice the steps and more numbers of experts.

    python -m experiments.paper all --scale=laptop --kept=laptop.jsonl \\
      --config.data.source='text/*.txt.xz' --config.data.documents=block --resources=CPU=1
    python -m experiments.sweep --config=configs/paper_laptop.py --dry_run     # every run of every claim
"""

from ml_collections import ConfigDict

from configs import paper_tiny


def get_config() -> ConfigDict:
    config = paper_tiny.get_config()
    config.train.update(num_steps=1200, log_every=50, eval_every=150)
    config.checkpoint.update(every=300)
    return config


def get_sweep() -> list[dict[str, list]]:
    from experiments import claims  # here, as a run has no need of it

    return claims.products("laptop")
