"""Settings of a run: frozen dataclasses, built from a ConfigDict and validated once.

Each field is documented where it is declared; `configs/*.py` only name what differs from these
defaults. A ``ValueError`` raised here is one line: the field, its value, what would be accepted.
"""

from switchmoe.settings.data import OBJECTIVES, DataSettings, TaskSettings
from switchmoe.settings.model import LOSS_WEIGHTS, ModelSettings, MoESettings
from switchmoe.settings.run import (
    CheckpointSettings,
    DistillSettings,
    InitSettings,
    MeshSettings,
    OptimizerSettings,
    TrainSettings,
)
from switchmoe.settings.whole import NUM_SENTINELS, Settings, default_config, from_config, to_dict

__all__ = [
    "LOSS_WEIGHTS",
    "NUM_SENTINELS",
    "OBJECTIVES",
    "CheckpointSettings",
    "DataSettings",
    "DistillSettings",
    "InitSettings",
    "MeshSettings",
    "ModelSettings",
    "MoESettings",
    "OptimizerSettings",
    "Settings",
    "TaskSettings",
    "TrainSettings",
    "default_config",
    "from_config",
    "to_dict",
]
