"""SuperGLUE (1905.00537) as T5 phrased it (1910.10683, appendix D)."""

import re

from switchmoe.data.tasks.glue import ENTAILMENT
from switchmoe.data.tasks.phrasing import Benchmark, Record, benchmark
from switchmoe.data.tasks.task import Example


def multirc(record: Record) -> Example:
    """``answers``: the judgement, and the question that it belongs to."""
    paragraph = re.sub(r"</?b>", "", record["paragraph"].replace("<br>", " "))
    text = f"multirc question: {record['question']} answer: {record['answer']} paragraph: {paragraph.strip()}"
    truth = ("False", "True")[record["label"]]
    return Example(text, truth, (truth, f"question {record['idx']['paragraph']}-{record['idx']['question']}"))


def copa(record: Record) -> Example:
    fields = " ".join(f"{field}: {record[field]}" for field in ("choice1", "choice2", "premise", "question"))
    return Example(f"copa {fields}", ("choice1", "choice2")[record["label"]])


def record_task(record: Record) -> Example:
    """ReCoRD: a passage, a query with a gap, and the entities of which one fills it."""
    passage = re.sub(r"(\.|\?|\!|\"|\')\n@highlight\n", r"\1 ", record["passage"]).replace(
        "\n@highlight\n", ". "
    )
    text = f"record query: {record['query']} entities: {', '.join(record['entities'])} passage: {passage}"
    answers = tuple(dict.fromkeys(record["answers"]))
    return Example(text, answers[0], answers)


def wsc(record: Record) -> Example:
    """The pronoun between stars; the noun is written, and counts as said of what it stands for. ``answers``: noun, True or False."""
    words = record["text"].split(" ")
    # Of two records the index is a word or so off.
    same = (n for n, word in enumerate(words) if word == record["span2_text"])
    place = min(same, key=lambda n: abs(n - record["span2_index"]), default=record["span2_index"])
    words[place] = f"*{words[place]}*"
    return Example(
        f"wsc: {' '.join(words)}", record["span1_text"], (record["span1_text"], str(bool(record["label"])))
    )


SUPER_GLUE = {
    "boolq": benchmark("super_glue/boolq", "boolq", ["passage", "question"], ("False", "True")),
    "cb": benchmark("super_glue/cb", "cb", ["hypothesis", "premise"], ("entailment", "contradiction", "neutral"), ("macro_f1", "accuracy")),
    "copa": Benchmark("super_glue/copa", copa, ("accuracy",), ("choice1", "choice2")),
    "multirc": Benchmark("super_glue/multirc", multirc, ("f1_positive", "multirc_em"), ("False", "True"), averaged=True),
    "record": Benchmark("super_glue/record", record_task, ("f1", "exact_match"), averaged=True),
    "superglue_rte": benchmark("super_glue/rte", "rte", ["hypothesis", "premise"], ENTAILMENT),
    "wic": benchmark("super_glue/wic", "wic", ["sentence1", "sentence2", "word"], ("False", "True")),
    "wsc": Benchmark("super_glue/wsc.fixed", wsc, ("wsc",), learnt=lambda record: bool(record["label"])),  # else the noun is wrong
}  # fmt: skip
