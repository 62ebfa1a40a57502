"""A small Switch Transformer of a decoder alone, on the embedded Wikipedia summaries: what it writes reads like English.

    python -m experiments.run --config=configs/quickstart_lm.py
    python -m experiments.generate --source=runs/quickstart_lm --prompt="The city of" --max_tokens=24

0.3 M parameters (0.2 M for a token), 16 experts in each of the 2 layers, 11.1 M tokens packed in rows of 96. 2 cores of an AMD EPYC, Python 3.13,
jax 0.12.0.1, seed 0, with other work beside it; held-out nats a token (unigram baseline: 6.076), and seconds in all:

    this config                        3.876    348 s
    --config.moe.num_experts=1         4.063    334 s

What it writes is grammatical and means little. The likeliest tokens after "Tokyo is the capital and largest city of Japan. It is": "the largest
city of the country's largest city of the country's largest city in the world."; drawn with --temperature=0.6 (seed 0): "one of the
country's capital and largest city of the country, making it the sixth-largest city in the". After "Henrik Johan Ibsen was a Norwegian
playwright." it says "He was awarded the first serving of the Arctician Empire, he was the first serving of the Arctic Republic of China."

Why a decoder alone. It learns from every token. The encoder-decoder of `quickstart.py` with 16 experts, asked to continue (prefix_lm, 2,000 steps of 128
rows of 32 + 16 tokens, 12.3 M tokens), ends at 3.851 nats of the targets, with all that came before to read, and goes on with pieces of words: "and s", "The sylics
are". It has not learnt by then to read the encoder.
"""

from ml_collections import ConfigDict

from switchmoe.settings import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model.update(stacks="decoder_only", d_model=64, d_ff=32, d_kv=16, num_heads=4, num_layers=2)
    config.model.update(activation="relu", dtype="float32", init_scale=1.0, scan_unroll=2)
    config.moe.update(num_experts=16, every=1, group_size=16384, router_init_stddev=0.4)
    config.moe.update(balance_loss_weight=1e-2, z_loss_weight=0.0)
    config.data.update(objective="causal_lm", batch_size=128, input_length=96, vocab_size=1948)
    config.optimizer.update(schedule="warmup_cosine", learning_rate=0.05, warmup_steps=50, momentum=0.9)
    config.train.update(num_steps=900, log_every=20, eval_every=150, eval_batches=16)
    config.checkpoint.update(every=300)
    return config
