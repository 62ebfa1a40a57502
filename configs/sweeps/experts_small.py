"""Experts at one GPU's scale: E = 1, 2, 4, ..., 512 in every other layer, bfloat16, the same work per token.

    python -m experiments.sweep --config=configs/sweeps/experts_small.py \\
      --config.data.source='text/*.txt.xz' --config.data.documents=block

Every figure here is arithmetic or an estimate: nothing was run. Give it 100 MB of text or more: a run reads about
50 M tokens, 40 times the embedded corpus, which is the default.

The dense model has 22.7 M parameters: 6.2 M of embedding (16,128 rows of 384), 4 + 4 layers. E experts add
(E - 1) x 4 layers x 1.18 M: 320 M in all at E = 64, 2.4 B at E = 512, which with float32 gradients take 20 GB;
Adafactor's factored state takes little more. A step has 256 x (256 + 57) = 80,128 tokens, a run 640 steps, 51.3 M
tokens. Groups are 32,768 tokens of the encoder, 64 for each of 512 experts and 80 slots, and the batch's 14,592 of
the decoder, 28.5 and 36.

Time on an H100, estimated: the matrix products of a step are 5 TFLOP (`--dry_run`), 0.034 s at 15 % of 989 TFLOP/s;
the update of E = 512 moves about 60 GB, 0.03 s: 22 to 45 s for 640 steps. But one thread makes the batches: 536,000
tokens/s of these lengths with a vocabulary of 1,948 pieces (measured, an AMD EPYC core among other work, a 118 MB
English text), which is 96 s a run. With 40 s of start-up, compilation and evaluation ten runs take some 23 minutes,
the input in the lead (input_wait_share in metrics.jsonl). The last state only is saved: that of E = 512 takes 10 GB.
"""

from ml_collections import ConfigDict

from switchmoe.settings import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model.update(d_model=384, d_ff=1536, d_kv=64, num_heads=6, num_layers=4, activation="relu")
    config.model.update(dtype="bfloat16", init_scale=1.0)
    config.moe.update(num_experts=1, group_size=32768, eval_group_size=32768)
    config.data.update(batch_size=256, input_length=256, vocab_size=16000, streams=16, prefetch=16)
    config.optimizer.update(schedule="warmup_cosine", learning_rate=0.03, warmup_steps=80)
    config.train.update(num_steps=640, log_every=20, eval_every=160, eval_batches=4)
    config.checkpoint.update(every=640, keep=1, keep_best=0)
    return config


def get_sweep() -> list[dict[str, list]]:
    return [{"moe.num_experts": [2**n for n in range(10)]}]
