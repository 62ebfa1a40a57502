"""Which kind of run settings are of."""

from switchmoe.runs import finetuning, text
from switchmoe.runs.parts import Kind
from switchmoe.settings import Settings


def of(settings: Settings) -> Kind:
    """Fine-tuning where tasks are named, else pre-training."""
    return finetuning.FINETUNING if settings.task.names else text.PRETRAINING
