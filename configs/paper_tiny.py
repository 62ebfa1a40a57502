"""The papers' claims on a CPU: the base of their runs, and all runs as one sweep (`experiments.claims`).

    python -m experiments.paper all --scale=tiny --kept=tiny.jsonl \\
      --config.data.source='text/*.txt.xz' --config.data.documents=block --resources=CPU=1
    python -m experiments.sweep --config=configs/paper_tiny.py --dry_run     # every run of every claim

Give it 25 MB of text or more, as a run reads 14.7 M tokens of about 1.5 letters.

A decoder alone of two blocks with experts in both: 0.07 M parameters dense, 0.20 M with 16 experts, 600 steps of 256 rows of
96 tokens. A batch is one group: 1,536 tokens for each of 16 experts and 1,920 slots at factor 1.25. The balancing loss, the
jitter and the capacity factors are the paper's; the z-loss, ST-MoE's, is off. Initialisation is at scale 1.0, and the
paper's 0.1 what Table 3 tries. The model with T5-Large's part has 3.5 times the base's FLOPs.

How it was chosen: by a search that looked at dense against experts alone, on seeds that no claim's run has
(`sweeps/paper_search.py`, `experiments/results/paper_search/results.csv`). The vocabulary of 400 pieces makes the feed-forward
remember what large embeddings do otherwise, and that is what experts add to. 16 experts are ahead of the dense model by

    span corruption, 600 steps                0.164, 0.181 nats (seeds 200, 201)
    causal, 600 steps                         0.246, 0.254
    causal, 300 steps                         0.263, 0.275, 0.239 (and 202)

The causal model decides more in the same time, and 600 steps leave a third of the noise of 300. At 300 steps, seed 200: 4
experts 0.177 ahead, 64 experts 0.379, two experts a token 0.308, the twin as wide as 16 experts (d_ff 512) 0.344; with four
blocks, for twice the time, 16 experts are 0.235 ahead, at twice the width 0.224, with a dense layer of 128 in place of 32
0.205, with experts in one of the two blocks 0.118, over 1,948 pieces 0.126 nats of a longer piece. Adafactor's rate and its
momentum are those of `sweeps/experts_tiny`, untouched.
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
