"""A dense student's settings beside those of its teacher.

    python -m experiments.distill --teacher=runs/quickstart --workdir=runs/student

The command reads this file as --config=configs/distill.py:DIR, with DIR of --teacher, and with --task as
configs/distill.py:task:DIR.

The student is the teacher's dense twin: of its width and depth, on its text or its tasks, with its rate and steps. A quarter of
the loss is the teacher's, and what is no expert begins with the teacher's parameters (2101.03961, table 6). Any field may be set,
such as model.d_ff for another shape.
"""

from ml_collections import ConfigDict

from configs import finetune, from_run
from switchmoe.runs import trained
from switchmoe.settings import to_dict


def get_config(argument: str = "") -> ConfigDict:
    task = argument.startswith("task:")
    directory = argument.removeprefix("task:")
    if not directory:
        raise ValueError("configs/distill.py: accepted is configs/distill.py:DIR, a run's directory")
    config = from_run.get_config(directory, "distill.teacher")
    config.task.update(to_dict(trained.find(directory, "distill.teacher").settings)["task"])
    config.init.checkpoint = ""
    config.moe.update(num_experts=1, route_one=False, expert_bits=0, expert_group=0)
    config.train.update(trainable="", patience=0)  # the teacher's own, where it was a fine-tuned run
    config.distill.teacher = directory
    return finetune.tuned(config) if task else config
