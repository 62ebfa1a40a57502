"""In which setting is "experts help" decided at least cost? The search before the claims' runs (`configs/paper_tiny.py`).

    python -m experiments.sweep --config=configs/sweeps/paper_search.py --config.data.source='text/*.txt.xz' \\
      --config.data.documents=block --resources=CPU=1

It looks at dense against experts alone, with seeds from 200 on, which no claim's run has, and it is done before the
first of them. First span corruption against a causal language model, 600 steps each. The causal one was 0.25 nats ahead
with 16 experts after 600 steps and as much after 300 of them, at the same time a step; span corruption 0.17. So the rest,
each of which changes one thing, is of causal models and 300 steps: more experts and fewer, the twin as wide as 16
experts, two experts a token, every second layer, depth, width, the dense layer's width, the vocabulary.
"""

from ml_collections import ConfigDict

from configs.sweeps import experts_tiny

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
    pair, short = [1, 16], CAUSAL | {"train.num_steps": [300]}
    found = [objective | {"moe.num_experts": pair, "train.seed": [200, 201]} for objective in ({}, CAUSAL)]
    found.append(short | {"moe.num_experts": pair, "train.seed": [200, 201, 202]})
    changes = [
        {"moe.num_experts": [64, 4]},
        {"moe.num_experts": [1], "model.d_ff": [512]},
        {"moe.num_experts": [16], "moe.router": ["top_k"], "moe.choices": [2]},
        {"moe.num_experts": pair, "model.num_layers": [4]},
        {"moe.num_experts": pair, "model.d_model": [128], "model.d_ff": [64]},
        {"moe.num_experts": pair, "model.d_ff": [128]},
        {"moe.num_experts": pair, "data.vocab_size": [1948]},
        {"moe.num_experts": [16], "moe.every": [2]},
    ]
    return found + [short | change | {"train.seed": [200]} for change in changes]
