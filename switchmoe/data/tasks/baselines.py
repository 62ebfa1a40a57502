"""What a task's score is without a language model: the yardstick beside a fine-tuned one."""

import collections
import contextlib
from collections.abc import Sequence

import numpy as np

from switchmoe.data.tasks.metrics import METRICS
from switchmoe.data.tasks.task import Example, Task, spread

FITTED = 20_000  # training examples at most
WORDS = 5


def scores(task: Task, held_out: Sequence[Example]) -> dict[str, float]:
    """The task's score by what answers: with classes the most frequent one, and a logistic regression on words and pairs of words
    (TF-IDF, scikit-learn, by stochastic gradients, where it is installed and the text has words that come twice); else the first
    five words that are read.
    """
    if not task.options:
        return {"first five words": _score(task, held_out, [_first_words(one.inputs) for one in held_out])}
    train = spread(task.examples("train"), FITTED)
    most = collections.Counter(example.targets for example in train).most_common(1)[0][0]
    found = {"majority": _score(task, held_out, [most] * len(held_out))}
    with contextlib.suppress(
        ImportError, ValueError
    ):  # no word comes twice, as in text without blanks; or one class
        found["TF-IDF"] = _score(task, held_out, _tf_idf(train, held_out))
    return found


def _score(task: Task, held_out: Sequence[Example], answers: Sequence[str]) -> float:
    right = [example.right for example in held_out]
    return float(np.mean([METRICS[name](answers, right) for name in task.scored]))


def _first_words(text: str) -> str:
    """Behind what names the task."""
    return " ".join(text.partition(": ")[2].split()[:WORDS]) or text


def _tf_idf(train: Sequence[Example], held_out: Sequence[Example]) -> list[str]:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import SGDClassifier
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    model = make_pipeline(words, SGDClassifier(loss="log_loss", alpha=1e-5, random_state=0))
    model.fit([example.inputs for example in train], [example.targets for example in train])
    return [str(found) for found in model.predict([example.inputs for example in held_out])]
