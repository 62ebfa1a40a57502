"""The paper's claims at its own scale, T5-Base on C4: the base of their runs, and all runs as one sweep (`experiments.claims`).

    python -m experiments.paper table1 --scale=base --dry_run --config.data.vocab=/path/to/spiece.model \\
      --config.data.data_dir=gs://bucket/tfds --config.mesh.layout=data_expert
    python -m experiments.sweep --config=configs/paper_base.py --dry_run     # every run of every claim

The base of `sweeps/experts_base` with 32 experts; Table 1 has 128. Not run here: it needs a pod, and this is the definition of
the study more than a command to type.
"""

from ml_collections import ConfigDict

from configs.sweeps import experts_base


def get_config() -> ConfigDict:
    config = experts_base.get_config()
    config.moe.num_experts = 32
    return config


def get_sweep() -> list[dict[str, list]]:
    from experiments import claims  # here, as a run has no need of it

    return claims.products("base")
