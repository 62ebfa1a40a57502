"""Pictures of a tuned model's answers."""

import json

from switchmoe.analysis import answers


def test_a_confusion_matrix_has_numbers_in_their_order(tmp_path):
    rows = [("-1", "2"), ("10", "-2"), ("2", "2"), ("-2", "-1")]
    path = tmp_path / "predictions.jsonl"
    lines = [{"task": "/far/away/feelings.jsonl", "targets": a, "ranked": b} for a, b in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (name, figure), *others = answers.confusions(path).items()
    axes = figure.axes[0]
    assert name == "confusion_feelings" and not others
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["-2", "-1", "2", "10"]
    assert answers.in_order({"b", "10", "a"}) == ["10", "a", "b"]


def test_a_line_of_a_files_metric_is_named_by_the_file_and_the_scores_line_is_below():
    record = {"split": "tasks", "step": 1, "/far/away/feelings.jsonl/accuracy": 30.0, "score": 30.0}
    axes = answers.scores([record, record | {"step": 2}]).axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert set(lines) == {"feelings.jsonl/accuracy", "score"}
    assert lines["score"].get_zorder() < lines["feelings.jsonl/accuracy"].get_zorder()
