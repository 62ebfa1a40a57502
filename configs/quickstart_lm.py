"""A small decoder-only mixture of experts on the embedded Wikipedia summaries, for a laptop's CPU.

    python -m experiments.run --config=configs/quickstart_lm.py
    python -m experiments.generate --source=runs/quickstart_lm --prompt="The city of" --temperature=0.7 --top_p=0.9

1.35 M parameters (0.76 M for a token), 4 layers of which every other one has 8 experts, 2 of them for each token; rotary
positions, 2 heads of keys and values for 4 of queries, queries and keys normed. 2.6 M tokens, packed in rows of 128.

Measured on 2 cores of an Intel Xeon (4th generation), Python 3.11, jax 0.10, seed 0: 319 s in all, of which compiling
takes 20; held-out cross-entropy 4.178 nats a token after 640 steps (unigram baseline 6.076), 4.842 after 160, 4.420 after
320. No expert of a layer is under 0.89 and 0.81 of its fair share of the held-out tokens. What it writes is grammatical in
short stretches and says nothing: "The city of" goes on, each time the likeliest token, "the Sweth of the Solar System."
"""

from ml_collections import ConfigDict

from switchmoe.settings import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model.update(stacks="decoder_only", d_model=128, d_ff=128, d_kv=32, num_heads=4, num_kv_heads=2)
    config.model.update(num_layers=4, activation="swiglu", positions="rotary", qk_norm="head")
    config.model.update(attention_scale=0.0, dtype="float32", init_scale=1.0, scan_unroll=2)
    config.moe.update(num_experts=8, every=2, router="top_k", choices=2, group_size=4096)
    config.moe.update(balance_loss_weight=1e-2, jitter=0.0)
    config.data.update(objective="causal_lm", batch_size=32, input_length=128, vocab_size=1948)
    config.optimizer.update(schedule="warmup_cosine", learning_rate=0.02, warmup_steps=50, momentum=0.9)
    config.train.update(num_steps=640, log_every=20, eval_every=160, eval_batches=16)
    config.checkpoint.update(every=320)
    return config
