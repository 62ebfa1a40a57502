"""What answers are judged by, 0 to 100: predictions and, for each, the answers that are right. By maintained libraries
(scikit-learn, rouge-score; sacrebleu: extra ``tasks``) where they have it.
"""

import collections
import importlib.util
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

from switchmoe.data.errors import DataError

Right = Sequence[tuple[str, ...]]


def check(name: str) -> None:
    """Raises DataError, one line: no such metric, or its package is missing."""
    if name not in METRICS:
        raise DataError(f"task.metrics={name}: accepted are {', '.join(METRICS)}")
    if name == "bleu" and importlib.util.find_spec("sacrebleu") is None:
        raise DataError(
            "task.metrics=bleu: it needs the package sacrebleu; accepted is after pip install sacrebleu"
        )


def accuracy(predictions: Sequence[str], right: Right) -> float:
    pairs = zip(predictions, right, strict=True)
    return _mean(found.strip() in map(str.strip, answers) for found, answers in pairs)


def macro_f1(predictions: Sequence[str], right: Right) -> float:
    """The classes' F1, each class counted alike; of the classes that are right somewhere."""
    from sklearn.metrics import f1_score

    truth = [answers[0] for answers in right]
    found = [prediction.strip() for prediction in predictions]
    return 100 * float(f1_score(truth, found, labels=sorted(set(truth)), average="macro", zero_division=0))


def matthews(predictions: Sequence[str], right: Right) -> float:
    """Matthews' correlation, as GLUE's CoLA has it."""
    from sklearn.metrics import matthews_corrcoef

    return 100 * float(
        matthews_corrcoef([answers[0] for answers in right], [found.strip() for found in predictions])
    )


POSITIVE = ("equivalent", "duplicate", "True")  # the classes that F1 is of: MRPC's, QQP's, MultiRC's


def f1_positive(predictions: Sequence[str], right: Right) -> float:
    """F1 of the class that is asked for; what is no class counts as wrong, as T5 has it."""
    truth = [answers[0] in POSITIVE for answers in right]
    classes = {*POSITIVE, *(answers[0] for answers in right)}
    pairs = zip((one.strip() for one in predictions), truth, strict=True)
    found = [one in POSITIVE if one in classes else not true for one, true in pairs]
    both = sum(a and b for a, b in zip(truth, found, strict=True))
    return 200 * both / max(1, sum(truth) + sum(found))


def multirc_em(predictions: Sequence[str], right: Right) -> float:
    """Questions of which each answer is judged as it should be; ``right``: the judgement and its question (`benchmarks.multirc`)."""
    questions = collections.defaultdict(list)
    for found, (truth, question) in zip(predictions, right, strict=True):
        questions[question].append(found.strip() == truth)
    return _mean(map(all, questions.values()))


def pearson(predictions: Sequence[str], right: Right) -> float:
    return _correlation("pearsonr", predictions, right)


def spearman(predictions: Sequence[str], right: Right) -> float:
    return _correlation("spearmanr", predictions, right)


def _correlation(kind: str, predictions: Sequence[str], right: Right) -> float:
    """What is no number counts as 0; without any spread there is no correlation, 0."""
    from scipy import stats

    truth = [float(answers[0]) for answers in right]
    found = [number(one) or 0.0 for one in predictions]
    if len(set(found)) < 2 or len(set(truth)) < 2:
        return 0.0
    return 100 * float(getattr(stats, kind)(truth, found).statistic)


def number(text: str) -> float | None:
    """None: it is none, or none that is finite."""
    return float(text) if re.fullmatch(r"\s*[-+]?\d+(\.\d+)?\s*", text) else None


def wsc(predictions: Sequence[str], right: Right) -> float:
    """The noun that is written is the one asked about, or not, as it should be (T5, appendix D.13): one's words are among the other's,
    and both or neither have an apostrophe. Nothing written is always wrong.
    """

    def same(found: str, noun: str) -> bool:
        one, other = (set(text.lower().split()) - DETERMINERS for text in (found, noun))
        return ("'" in found) == ("'" in noun) and (one <= other or other <= one)

    pairs = zip(predictions, right, strict=True)
    return _mean(
        bool(found.strip()) and same(found, noun) == (truth == "True") for found, (noun, truth) in pairs
    )


DETERMINERS = set(
    "a an few her his each every many much my our some that the their these this those which whose your".split()
)


def exact_match(predictions: Sequence[str], right: Right) -> float:
    """SQuAD's: after case, punctuation, articles and blanks are set aside, the best of the right answers."""
    pairs = zip(predictions, right, strict=True)
    return _mean(any(_normal(found) == _normal(answer) for answer in answers) for found, answers in pairs)


def f1(predictions: Sequence[str], right: Right) -> float:
    """SQuAD's: of the words that answer and prediction share, the best of the right answers."""
    return _mean(
        max(_word_f1(found, answer) for answer in answers)
        for found, answers in zip(predictions, right, strict=True)
    )


def rouge_l(predictions: Sequence[str], right: Right) -> float:
    return _rouge("rougeL", predictions, right)


def rouge_1(predictions: Sequence[str], right: Right) -> float:
    return _rouge("rouge1", predictions, right)


def rouge_2(predictions: Sequence[str], right: Right) -> float:
    return _rouge("rouge2", predictions, right)


def bleu(predictions: Sequence[str], right: Right) -> float:
    import sacrebleu

    most = max(map(len, right))
    references = [[(*answers, *[answers[0]] * most)[i] for answers in right] for i in range(most)]
    return float(sacrebleu.corpus_bleu(list(predictions), references).score)


def _rouge(kind: str, predictions: Sequence[str], right: Right) -> float:
    """F of the best of the right answers, mean over examples."""
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer([kind], use_stemmer=True)
    return _mean(
        scorer.score_multi(answers, found)[kind].fmeasure
        for found, answers in zip(predictions, right, strict=True)
    )


def _normal(text: str) -> str:
    """As the script of SQuAD 1.1 has it."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _word_f1(prediction: str, answer: str) -> float:
    found, right = _normal(prediction).split(), _normal(answer).split()
    shared = sum((collections.Counter(found) & collections.Counter(right)).values())
    return 2 * shared / (len(found) + len(right)) if shared else 0.0


def _mean(values: Any) -> float:
    found = [float(value) for value in values]
    return 100 * sum(found) / len(found)


METRICS: dict[str, Callable[[Sequence[str], Right], float]] = {
    metric.__name__: metric
    for metric in (
        accuracy,
        macro_f1,
        f1_positive,
        matthews,
        multirc_em,
        pearson,
        spearman,
        exact_match,
        f1,
        wsc,
        rouge_l,
        rouge_1,
        rouge_2,
        bleu,
    )
}
OWN = {"multirc_em", "wsc"}  # of benchmarks whose examples carry more than the answer
