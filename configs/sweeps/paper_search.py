"""In which setting is "experts help" decided at least cost? The search before the claims' runs (`configs/paper_tiny.py`).

    python -m experiments.sweep --config=configs/sweeps/paper_search.py --config.data.source='text/*.txt.xz' \\
      --config.data.documents=block --resources=CPU=1

It looks at dense against experts alone, with seeds from 200 on, which no claim's run has, and it is done before the
first of them. Each product changes one thing of the base: the objective, the twin as wide as 16 experts, width, depth,
the dense layer's width, every second layer, two experts a token, the vocabulary.
"""

from ml_collections import ConfigDict

from configs.sweeps import experts_tiny

SEEDS = [200, 201]
CAUSAL = {"data.objective": ["causal_lm"], "model.stacks": ["decoder_only"], "data.input_length": [96]}


def get_config() -> ConfigDict:
    config = experts_tiny.get_config()
    config.moe.dropless = True
    config.data.update(
        batch_size=256, input_length=64, noise_density=0.25, mean_span_length=20.0, vocab_size=400
    )
    config.train.update(num_steps=600, log_every=25, eval_every=75, eval_batches=32)
    config.checkpoint.update(every=300, keep=1, keep_best=0)
    return config


def get_sweep() -> list[dict[str, list]]:
    pair, first = [1, 16], [200]
    return [
        {"moe.num_experts": pair, "train.seed": SEEDS},
        CAUSAL | {"moe.num_experts": pair, "train.seed": SEEDS},
        {"moe.num_experts": [1], "model.d_ff": [512], "train.seed": SEEDS},
        CAUSAL | {"moe.num_experts": [1], "model.d_ff": [512], "train.seed": SEEDS},
        {"moe.num_experts": [64], "train.seed": SEEDS},
        CAUSAL | {"moe.num_experts": [64], "train.seed": SEEDS},
        {"moe.num_experts": [16], "moe.router": ["top_k"], "moe.choices": [2], "train.seed": first},
        {"moe.num_experts": [16], "moe.every": [2], "train.seed": first},
        {"moe.num_experts": pair, "model.num_layers": [4], "train.seed": first},
        {"moe.num_experts": pair, "model.d_model": [128], "model.d_ff": [64], "train.seed": first},
        {"moe.num_experts": pair, "model.d_ff": [128], "train.seed": first},
        {"moe.num_experts": pair, "data.vocab_size": [1948], "train.seed": first},
        {"moe.num_experts": [4], "train.seed": first},
    ]
