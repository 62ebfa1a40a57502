"""lm-eval asks the server as any of OpenAI's shape: `local-completions`, on a small task of local files."""

import json

import numpy as np
import pytest
from serving import Running, scripted, vocabulary

from switchmoe.interop import tokenizer

pytestmark = pytest.mark.long
DOCS = [
    {"question": "The city of", "choices": [" old", " town"], "answer": 0},
    {"question": "the river", "choices": [" Main", " caf\u00e9s"], "answer": 1},
    {"question": "of the", "choices": [" tower", " city"], "answer": 1},
]
TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITTEN = """
task: tiny_written
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 8, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def test_local_completions(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for name, text in (("choice", TASK), ("written", WRITTEN)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("FILE", str(tmp_path / "docs.jsonl")))
    for name, value in tokenizer.files(vocabulary(), 0, None).items():
        (tmp_path / name).write_text(json.dumps(value))
    with Running() as running:
        running.ready()
        found = simple_evaluate(
            model="local-completions",
            model_args=dict(
                model="decoder",
                base_url=f"{running.url}/v1/completions",
                tokenizer=str(tmp_path),
                max_length=32,
                num_concurrent=2,
            ),
            tasks=["tiny_choice", "tiny_written"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            bootstrap_iters=0,
        )
        answers = [sample["resps"][0][0] for sample in found["samples"]["tiny_written"]]
        wanted = [
            running.post(prompt=ids(doc["question"]), max_tokens=8, temperature=0, stop=["e"]).json()[
                "choices"
            ][0]["text"]
            for doc in DOCS
        ]
    assert answers == wanted
    right = [
        int(np.argmax([log_prob(doc["question"], choice) for choice in doc["choices"]])) == doc["answer"]
        for doc in DOCS
    ]
    assert found["results"]["tiny_choice"]["acc,none"] == pytest.approx(np.mean(right))
    for sample, doc in zip(found["samples"]["tiny_choice"], DOCS, strict=True):
        told = [float(response[0][0]) for response in sample["resps"]]
        assert told == pytest.approx([log_prob(doc["question"], choice) for choice in doc["choices"]])


def ids(text):
    return [int(token) for token in vocabulary().encode(text)]


def log_prob(context, continuation):
    """As the scripted model has it, of ids as lm-eval makes them."""
    made, before = scripted("decoder"), ids(context)
    whole = ids(context + continuation)
    return float(made.scores(made.prefill(whole)).log_prob_P[len(before) - 1 :].sum())
