"""The paper's claims on a CPU: the base of their runs, and all runs as one sweep (`experiments.claims`).

    python -m experiments.paper table1 table2 table3 table11 figure4 figure5 figure6 figure12 --scale=tiny \\
      --config.data.source='text/*.txt.xz' --config.data.documents=block --resources=CPU=1
    python -m experiments.sweep --config=configs/paper_tiny.py --dry_run     # every run of every claim

Give it 50 MB of text or more, as a run reads 3.8 M tokens and the embedded corpus has 1.6 M.

Model, vocabulary and rate are those of `sweeps/experts_tiny`, with a quarter of its batch: 128 x (24 + 6) = 3,840
tokens a step. A batch is one group: 3,072 tokens of the encoder, 384 for each of 8 experts and 480 slots at factor
1.25, and 768 of the decoder, 96 and 120. The balancing loss, the jitter and the capacity factors are the paper's; the
z-loss, ST-MoE's, is off. Initialisation is at scale 1.0, and the paper's 0.1 what Table 3 tries. Evaluated is every
100 steps, as time and steps to a loss are read between two evaluations. The model with T5-Large's part has 3.52 times
the base's FLOPs.

Measured on 2 cores of an Intel Xeon with AMX (4th generation), one run to a core (--resources=CPU=1), Python 3.13, jax
0.12.0.1: a run takes 1.1 to 1.8 minutes of training, the wide dense model 3.5, the 55 runs of the first command 51 minutes.
`experiments/results/paper_tiny/scorecard.md` has what they say: seeds differ by 0.01 to 0.02, more than most arms do.
"""

from ml_collections import ConfigDict

from configs.sweeps import paper_search


def get_config() -> ConfigDict:
    config = paper_search.get_config()
    config.model.stacks = "decoder_only"
    config.moe.update(num_experts=16, dropless=False, capacity_factor=1.25, jitter=1e-2)
    config.moe.update(group_size=32768, eval_group_size=32768)
    config.data.update(objective="causal_lm", input_length=96)
    return config


def get_sweep() -> list[dict[str, list]]:
    from experiments import claims  # here, as a run has no need of it

    return claims.products("tiny")
