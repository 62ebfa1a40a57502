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
    return _mean(found.strip() in answers for found, answers in zip(predictions, right, strict=True))


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
    """F1 of the class that is asked for."""
    truth = [answers[0] in POSITIVE for answers in right]
    found = [prediction.strip() in POSITIVE for prediction in predictions]
    both = sum(a and b for a, b in zip(truth, found, strict=True))
    return 200 * both / max(1, sum(truth) + sum(found))


def pearson(predictions: Sequence[str], right: Right) -> float:
    return _correlation("pearsonr", predictions, right)


def spearman(predictions: Sequence[str], right: Right) -> float:
    return _correlation("spearmanr", predictions, right)


def _correlation(kind: str, predictions: Sequence[str], right: Right) -> float:
    """What is no number counts as 0; without any spread there is no correlation, 0."""
    from scipy import stats

    truth = [float(answers[0]) for answers in right]
    found = [float(text) if re.fullmatch(r"\d+(\.\d+)?", text := one.strip()) else 0.0 for one in predictions]
    if len(set(found)) < 2 or len(set(truth)) < 2:
        return 0.0
    return 100 * float(getattr(stats, kind)(truth, found).statistic)


def wsc(predictions: Sequence[str], right: Right) -> float:
    """The noun that is written is the one asked about, or not, as it should be (T5, appendix D.13): one's words are among the other's."""
    said = []
    for found, (noun, _) in zip(predictions, right, strict=True):
        one, other = (set(text.lower().split()) - DETERMINERS for text in (found, noun))
        said.append(bool(one) and (one <= other or other <= one))
    return _mean(now == (truth == "True") for now, (_, truth) in zip(said, right, strict=True))


DETERMINERS = {
    "a",
    "an",
    "the",
    "my",
    "your",
    "his",
    "her",
    "its",
    "our",
    "their",
    "this",
    "that",
    "these",
    "those",
}


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
