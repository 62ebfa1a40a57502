"""A decoder alone, large enough to be tuned on tasks afterwards, for a text of 100 MB or so; half the work is the vocabulary's 8,000 pieces.

    python -m experiments.run --config=configs/small_lm.py --workdir=runs/small_lm \\
      --config.data.source=english-large.txt.xz --config.data.documents=block

3 layers of width 128, 16 experts in each, 2.8 M parameters (1.4 M for a token), 18.4 M tokens in rows of 192. That text is 117.7 MB of English
documents with blank lines between them (`configs/sweeps/experts_tiny.py` says what is in it; it is not in this repository).
Held-out nats a piece, 4.597 (unigram baseline 7.000), seed 0, commit 9d9a1b2: 4,894 s of one core of an AMD EPYC with other
work beside it, Python 3.13, jax 0.12. What became of it on four tasks is in `docs/fine_tuning.md`.
"""

from ml_collections import ConfigDict

from configs import quickstart_lm


def get_config() -> ConfigDict:
    config = quickstart_lm.get_config()
    config.model.update(d_model=128, d_ff=128, d_kv=32, num_layers=3)
    config.data.update(batch_size=48, input_length=192, vocab_size=8000)
    config.optimizer.update(learning_rate=0.03, warmup_steps=100)
    config.train.update(num_steps=2000, eval_every=500)
    config.checkpoint.update(every=250)
    return config
