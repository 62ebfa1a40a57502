"""Experts on a CPU: E = 1, 2, 4, ..., 512 in every other layer, the same work per token, group and batch for all.

    python -m experiments.sweep --config=configs/sweeps/experts_tiny.py \\
      --config.data.source='text/*.txt.xz' --config.data.documents=block

Without a source it reads the embedded corpus, whose 1.2 M tokens each run would see some sixteen times: give it 100 MB of
text, of which a run's 19.6 M tokens are about half. Plan it with `--dry_run`.

Sizes. A small model and vocabulary (0.36 M parameters dense, 33.9 M at E = 512), so that 1,300 steps of
128 x (96 + 22) = 15,104 tokens are affordable. The whole batch is one group (moe.group_size is larger): of the encoder
12,288 tokens, 24 for each of 512 experts and 30 slots at factor 1.25; of the decoder 2,816 tokens, 5.5 and 7. Evaluated
is in groups of a batch, too: with a sequence as a group an expert of 512 would have a single slot. The FLOPs are the
same but for the routers', which are 20 % on top at E = 512 (`--dry_run`: 1.79e10 a step against 1.49e10). The
embedding and the first block of each stack are shared by all; what E changes is one feed-forward of two.

Measured on 2 cores of an AMD EPYC that had other work, Python 3.11, jax 0.10.2, seed 0, a 118 MB English text:

    E = 1     33,081 tokens/s (steps 21-40 of 40)
    E = 64    15,400 to 22,900 tokens/s (steps 20-110 of 110, the cores shared); dropped 58 % at step 1, 40 to 60 % up
              to step 70, 6.6 % at 100; of 110 steps the schedule's end had little rate left, which helps

Estimated from these, as E = 128, 256 and 512 were not run: 10 minutes for E = 1, 11 to 16 up to E = 64, up to 22 for
E = 512 (whose update writes 34 M parameters a step), 2 to 2.4 hours in all.
"""

from ml_collections import ConfigDict

from switchmoe.settings import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model.update(d_model=64, d_ff=256, d_kv=16, num_heads=4, num_layers=2, activation="relu")
    config.model.update(dtype="float32", init_scale=1.0, scan_unroll=2)
    config.moe.update(num_experts=1, group_size=16384, eval_group_size=16384, router_init_stddev=0.1)
    config.data.update(batch_size=128, input_length=96, vocab_size=1948, streams=1)
    config.optimizer.update(schedule="warmup_cosine", learning_rate=0.05, warmup_steps=50)
    config.train.update(num_steps=1300, log_every=20, eval_every=260, eval_batches=8)
    config.checkpoint.update(every=260)
    return config


def get_sweep() -> list[dict[str, list]]:
    return [{"moe.num_experts": [2**n for n in range(10)]}]
