"""Experts on a CPU: E = 1, 2, 4, ..., 512 in every layer, the same batch, group and text for all.

    python -m experiments.sweep --config=configs/sweeps/experts_tiny.py \\
      --config.data.source='text/*.txt.xz' --config.data.documents=block

Without a source it reads the embedded corpus, whose 1.6 M tokens each run would see some eleven times: give it
100 MB of text, of which a run's 20.7 M tokens are about half. Plan it with `--dry_run`.

Sizes. 0.25 M parameters dense, 8.75 M at E = 512; 1,350 steps of 512 x (24 + 6) = 15,360 tokens. The whole batch is
one group (moe.group_size is larger): of the encoder 12,288 tokens, 24 for each of 512 experts and 48 slots at factor
2.0; of the decoder 3,072 tokens, 6 and 12. Evaluated is in groups of a batch, too: with a sequence as a group an
expert of 512 would have a single slot. Each expert has the dense feed-forward's work for a token; the router comes on
top, and as the feed-forward is narrow that is 4 % of a step's FLOPs at E = 32, 18 % at 128 and 72 % at 512.

Why so small and so short. Experts add feed-forward width; where the dense one is wide enough they have nothing to
give. Measured with sequences of 96 tokens, 7.9 M tokens and streams=1: a dense d_ff of 1024 was 0.09 ahead of one of
32. Longer sequences hide it: the loss stays on a plateau until the decoder has learnt which of several gaps it fills,
then falls by 0.2 within some hundred steps, and when that happens differs by seed. At 96 tokens it was step 600 of
1,350 for E = 1 and later than 960 for E = 2; in 24 tokens there is a single gap of four, at the end (T5's spans end
with a gap), and it falls early and smoothly: the task is to continue a text, as a prefix language model does. With
streams=1 neighbouring rows are of one long document, whose tokens go to few experts (22 % dropped at one step);
streams=0 shuffles them.

Measured on 2 cores of an Intel Xeon with AMX (4th generation), one run to a core, Python 3.13, jax 0.12.0.1, seed 0, a
118 MB English text, the command above for two of its runs:

    held out after   2.1 M   6.2 M   10.4 M   14.5 M   20.7 M tokens      tokens/s
    E = 1            3.945   3.377    3.225    3.121    3.063             40,000
    E = 32           3.895   3.364    3.202    3.074    3.007             33,200

At E = 32 27 % and 40 % of the decoder's tokens were dropped at step 45, 13 % and 8 % at step 180, none at the end; of
the held-out text 0.4 %, and no expert was under 0.63 of its fair share. The other runs are estimated: 9 to 22 minutes
each on one core, 65 minutes in all with two at a time.
"""

from ml_collections import ConfigDict

from switchmoe.settings import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model.update(d_model=64, d_ff=32, d_kv=16, num_heads=4, num_layers=2, activation="relu")
    config.model.update(dtype="float32", init_scale=1.0, scan_unroll=2)
    config.moe.update(num_experts=1, every=1, capacity_factor=2.0, group_size=16384, eval_group_size=16384)
    config.moe.update(router_init_stddev=0.4, z_loss_weight=0.0, jitter=0.0)
    config.data.update(batch_size=512, input_length=24, vocab_size=1948)
    config.optimizer.update(schedule="warmup_cosine", learning_rate=0.05, warmup_steps=50, momentum=0.9)
    config.train.update(num_steps=1350, log_every=45, eval_every=135, eval_batches=16)
    config.checkpoint.update(every=270)
    return config


def get_sweep() -> list[dict[str, list]]:
    return [{"moe.num_experts": [2**n for n in range(10)]}]
