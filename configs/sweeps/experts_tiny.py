"""Experts on a CPU: E = 1, 2, 4, ..., 512 in every layer, the same batch, group and text for all.

    python -m experiments.sweep --config=configs/sweeps/experts_tiny.py \\
      --config.data.source='text/*.txt.xz' --config.data.documents=block --resources=CPU=1

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

Measured (`experiments/results/experts_tiny`, by `python -m experiments.analyze`): seed 0, 2 cores of an Intel Xeon with
AMX (4th generation), one run to a core, Python 3.13, jax 0.12.0.1, commit fd91a5e, 66 minutes in all. The text: 61,131
English documents, 117.7 MB, 19.4 M words (encyclopaedia, manuals, package descriptions, glosses, novels, essays, under
mixed free licences and so not part of this project), file's SHA-256 12c0d635...4a0c4585; 58,042 documents to train on.

    E                       1      2      4      8     16     32     64    128    256    512
    held out            3.066  3.065  3.040  3.022  3.017  3.019  2.994  3.005  3.069  3.099
    dropped, first tenth         0.0    1.9    2.1   12.5   12.6   18.2   28.4   37.4   43.2  %
    dropped, held out            0.0    0.0    0.0    0.2    0.6    0.9    1.7    3.5    5.3  %
    busiest expert              1.19   1.14   1.27   1.25   1.42   1.63   1.86   2.44   4.06  of its fair share
    idlest expert               0.81   0.84   0.77   0.79   0.65   0.47      0      0      0  of its fair share

One seed: 0.01 between neighbours says nothing (E = 16 and 32). The loss falls up to 64 experts. Beyond, an encoder's
expert sees 0.13 M tokens (E = 128) and less in the whole run, a decoder's a quarter of that; a third and more of the
tokens are dropped in the first steps of 256 and 512, and some experts end without any: the text is too short for them.
So all ten do not show the law of Clark et al.: the interval of its slope reaches across 0 (fit.json). E = 256 and 512 took 19 and 28
minutes of training, as other work took part of the cores; at the speed of their last steps, 26,400 and 16,500 tokens/s,
it is 13 and 21. The others took 7 to 10 minutes, E = 64 with a little work beside it.
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
