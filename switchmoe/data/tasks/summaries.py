"""A text in fewer words or in another language, as T5 asks for it (1910.10683, appendix D)."""

from switchmoe.data.tasks.phrasing import Benchmark, Make, Record
from switchmoe.data.tasks.task import Example


def summary(inputs: str, targets: str) -> Make:
    return lambda record: Example(f"summarize: {record[inputs]}", record[targets])


def translation(record: Record) -> Example:
    return Example(f"translate English to German: {record['en']}", record["de"])


SUMMARIES = {
    "cnn_dailymail": Benchmark(
        "cnn_dailymail", summary("article", "highlights"), ("rouge_2", "rouge_l", "rouge_1")
    ),
    "xsum": Benchmark("xsum", summary("document", "summary"), ("rouge_2", "rouge_l", "rouge_1")),
}
TRANSLATIONS = {
    "wmt_en_de": Benchmark("wmt14_translate/de-en", translation, ("bleu",)),
}
