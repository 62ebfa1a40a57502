"""Settings of a run or a converted checkpoint, and training that begins with its parameters.

    python -m experiments.run --config=configs/from_run.py:DIR --workdir=runs/further --config.data.source='texts/*.txt'

DIR is a run's directory, DIR|STEP or DIR/checkpoints/STEP. Its vocabulary is taken, too. Text, lengths, learning rate and steps
are as in DIR and to be said anew: a converted checkpoint has no more than the library's defaults of them.
"""

from ml_collections import ConfigDict

from switchmoe.runs import trained
from switchmoe.settings import Settings, to_dict


def get_config(directory: str = "", field: str = "init.checkpoint") -> ConfigDict:
    """``field`` is what a mistake's line calls the directory."""
    if not directory:
        raise ValueError("configs/from_run.py: accepted is configs/from_run.py:DIR, a run's directory")
    config = ConfigDict(to_dict(trained.find(directory, field).settings))
    plain = to_dict(Settings())
    config.update({group: plain[group] for group in ("init", "task", "distill")})
    config.init.checkpoint = directory
    return config
