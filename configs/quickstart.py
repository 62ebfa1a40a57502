"""A small Switch Transformer on the embedded Wikipedia summaries, for a laptop's CPU."""

from ml_collections import ConfigDict

from switchmoe.settings import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model.update(
        d_model=128, d_ff=512, d_kv=32, num_heads=4, num_layers=2, dtype="float32", init_scale=1.0
    )
    config.moe.update(num_experts=8, group_size=1024)
    config.data.update(batch_size=32, input_length=96, vocab_size=3996)
    config.optimizer.update(schedule="rsqrt", warmup_steps=100, learning_rate=0.1)
    config.train.update(num_steps=300, log_every=10, eval_every=100, eval_batches=8)
    config.checkpoint.update(every=100)
    return config
