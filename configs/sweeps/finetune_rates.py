"""Rate and batch size of fine-tuning, sparse against dense (ST-MoE, 2202.08906, table 20): three of each, on one task.

    python -m experiments.sweep --config=configs/sweeps/finetune_rates.py --config.data.source='text/*.txt.xz' \\
      --config.data.documents=block --resources=CPU=1

Two models are pre-trained as `configs/paper_tiny.py` says, a dense one and one of 16 experts, and each is tuned nine times on the
packaged summaries' topics, as Switch Transformers tunes (dropout 0.1, in the experts 0.4). A run reads 19,200 examples, about
two epochs, whatever its batch: the paper's smaller batches are a quarter and a sixteenth of the largest, too. Its task is
SuperGLUE, its batches 1 M, 262 k and 65 k tokens, its rates these; it finds, as a text, that sparse models want a smaller batch
and a higher rate than dense ones. Its scores:

    batch            1 M                 262 k                65 k
    rate     1e-3  5e-4  1e-4     1e-3  5e-4  1e-4     1e-3  5e-4  1e-4
    sparse   86.9  86.1  84.3     86.2  85.5  85.1     85.8  86.5  85.6
    dense    84.8  84.8  84.0     84.9  84.9  85.1     83.7  84.4  84.9

Its best cell is the largest batch's at the highest rate, which is not what the text says. Not run here; a run's score is `scores`
in its `run.json`. Other rates, batches or another task: a copy of this file.
"""

from ml_collections import ConfigDict

from configs import paper_tiny

EXAMPLES = 19_200
TUNED = {
    "task.names": ["topic"],
    "task.eval_examples": [0],
    "data.input_length": [448],
    "data.target_length": [24],
    "model.dropout_rate": [0.1],
    "optimizer.schedule": ["constant"],
}


def get_config() -> ConfigDict:
    return paper_tiny.get_config()


def get_sweep() -> list[dict[str, list]]:
    products = [{"moe.num_experts": [1, 16]}]
    for experts, dropout in ((1, 0.0), (16, 0.4)):
        before = {"moe.num_experts": [experts], "init.checkpoint": [f"moe.num_experts={experts}"]}
        for batch in (64, 16, 4):
            how = {"data.batch_size": [batch], "train.num_steps": [EXAMPLES // batch]}
            how["train.eval_every"] = how["checkpoint.every"] = [EXAMPLES // batch // 5]
            rates = {"optimizer.learning_rate": [1e-3, 5e-4, 1e-4]}
            products.append(before | TUNED | {"moe.expert_dropout_rate": [dropout]} | how | rates)
    return products
