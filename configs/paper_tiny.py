"""The paper's claims on a CPU: the base of their runs, and all runs as one sweep (`experiments.claims`).

    python -m experiments.paper table1 table2 table3 table11 figure4 figure5 figure6 figure12 --scale=tiny \\
      --config.data.source='text/*.txt.xz' --config.data.documents=block
    python -m experiments.sweep --config=configs/paper_tiny.py --dry_run     # every run of every claim

Give it 50 MB of text or more, as a run reads 3.8 M tokens and the embedded corpus has 1.2 M.

Model, vocabulary and rate are those of `sweeps/experts_tiny`, with a quarter of its batch: 32 x (96 + 22) = 3,776 tokens
a step. A batch is one group: 3,072 tokens of the encoder, 384 for each of 8 experts and 480 slots at factor 1.25, and
704 of the decoder, 88 and 110. The balancing loss, the jitter and the capacity factors are the paper's; the z-loss,
ST-MoE's, is off. Initialisation is at scale 1.0, and the paper's 0.1 what Table 3 tries. Evaluated is every 100 steps, as
time and steps to a loss are read between two evaluations.

Measured on 2 cores of an AMD EPYC with bfloat16 units, light work beside, Python 3.11, jax 0.10.2, seed 0, tokens/s in the last
20 steps of 60 (`experiments.run` with this config, a 118 MB English text):

    dense                        50,400         E = 8, bfloat16                       43,100
    dense, T5-Large's part       19,900         E = 8, bfloat16, the router too       39,800
    E = 8 (of 120 steps)         33,100         E = 8, two choices, factor 2.0        35,000
    E = 32 (of 120 steps)        31,500

and 33 seconds a run for start-up, reading the text, compilation, evaluation and the report. Estimated from these: 2.3 hours for
the 55 runs of the first command, 4 to 4.5 hours for all 100. (`--dry_run` assumes 30 % of the peak until a run is done, and 1 hour.)
"""

from ml_collections import ConfigDict

from configs.sweeps import experts_tiny


def get_config() -> ConfigDict:
    config = experts_tiny.get_config()
    config.moe.update(num_experts=8, group_size=4096, eval_group_size=4096, z_loss_weight=0.0)
    config.data.update(batch_size=32)
    config.train.update(num_steps=1000, eval_every=100, eval_batches=16)
    config.checkpoint.update(every=500, keep=1, keep_best=0)
    return config


def get_sweep() -> list[dict[str, list]]:
    from experiments import claims  # here, as a run has no need of it

    return claims.products("tiny")
