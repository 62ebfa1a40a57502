"""GLUE (1804.07461) as T5 phrased it (1910.10683, appendix D)."""

from switchmoe.data.tasks.phrasing import Benchmark, Record, benchmark
from switchmoe.data.tasks.task import Example

ENTAILMENT = ("entailment", "not_entailment")
NLI = ("entailment", "neutral", "contradiction")


def similarity(record: Record) -> Example:
    """STS-B: a number from 0 to 5, rounded to a fifth, as text."""
    number = round(record["label"] * 5) / 5
    return Example(f"stsb sentence1: {record['sentence1']} sentence2: {record['sentence2']}", f"{number:.1f}")


GLUE = {
    "cola": benchmark("glue/cola", "cola", ["sentence"], ("unacceptable", "acceptable"), ("matthews",)),
    "sst2": benchmark("glue/sst2", "sst2", ["sentence"], ("negative", "positive")),
    "mrpc": benchmark("glue/mrpc", "mrpc", ["sentence1", "sentence2"], ("not_equivalent", "equivalent"), ("f1_positive", "accuracy")),
    "stsb": Benchmark("glue/stsb", similarity, ("pearson", "spearman"), averaged=True),
    "qqp": benchmark("glue/qqp", "qqp", ["question1", "question2"], ("not_duplicate", "duplicate"), ("f1_positive", "accuracy")),
    "mnli": benchmark("glue/mnli", "mnli", ["hypothesis", "premise"], NLI, held_out="validation_matched"),
    "qnli": benchmark("glue/qnli", "qnli", ["question", "sentence"], ENTAILMENT),
    "rte": benchmark("glue/rte", "rte", ["sentence1", "sentence2"], ENTAILMENT),
    "wnli": benchmark("glue/wnli", "wnli", ["sentence1", "sentence2"], ("not_entailment", "entailment")),
}  # fmt: skip
