"""Fine-tuning's own settings beside those of the model that it begins with.

    python -m experiments.finetune --init=runs/quickstart --task=topic --workdir=runs/topic

The command reads this file as --config=configs/finetune.py:DIR, with DIR of --init.

As T5 and Switch Transformers fine-tune (1910.10683, 3.1; 2101.03961, table 4): a constant rate, dropout 0.1 and 0.4 in the
experts. Lengths are those that hold 99 % of the tasks' examples.
"""

from ml_collections import ConfigDict

from configs import from_run


def get_config(directory: str = "") -> ConfigDict:
    return tuned(from_run.get_config(directory))


def tuned(config: ConfigDict) -> ConfigDict:
    """With what fine-tuning sets."""
    config.model.update(dropout_rate=0.1, shared_dropout=True)
    config.moe.update(expert_dropout_rate=0.4)
    config.data.update(batch_size=64, streams=0)
    config.optimizer.update(schedule="constant", learning_rate=1e-3, clip_norm=0.0)
    config.train.update(num_steps=500, log_every=20, eval_every=100, eval_batches=16, accumulate=1)
    config.train.update(trainable="", patience=0)  # the run's own were for another training
    config.checkpoint.update(every=100, keep=1, keep_best=1)
    return config
