"""`experiments.bench serving`: what its soak takes for wrong, where its rounds end, and its short form on a trained model."""

import argparse
import json
import random

import pytest
from test_run import DECODER_ONLY, finish, start

from experiments.bench import serving, soak


class Fake:
    """A server that gives these answers, one after the other."""

    def __init__(self, *answers):
        self._answers = iter(answers)

    def ask(self, method, path, body):
        status, text = next(self._answers)
        return status, json.dumps(
            {"choices": [{"text": text}]} if status == 200 else {"error": text}
        ).encode()


def test_a_good_request_that_is_answered_differently_the_second_time_is_wrong():
    test = soak.Soak(Fake((200, "a"), (429, "full"), (200, "a"), (200, "b"), (500, "broken")), [[5]], 4)
    wrong = []
    for _ in range(5):
        test.good(random.Random(0))
        wrong.append(len(test.wrong))
    assert wrong == [0, 0, 0, 1, 2] and test.counts == {"good: 200": 4, "good: 429": 1}


def test_a_bad_request_that_is_answered_as_a_good_one_is_wrong(monkeypatch):
    monkeypatch.setattr(soak, "BAD", [({"prompt": "a", "temperature": -1}, 400)])
    test = soak.Soak(Fake((400, "temperature"), (503, "busy"), (200, "a"), (404, "model")), [[5]], 4)
    wrong = []
    for _ in range(4):
        test.bad(random.Random(0))
        wrong.append(len(test.wrong))
    assert wrong == [0, 0, 1, 2]


def test_memory_is_only_judged_where_there_was_time_to_see_it():
    growing = [(second, 100 + second) for second in range(121)]  # a MiB a second
    assert soak.growth(growing) == pytest.approx(60) and soak.growth(growing[:30]) is None


class Timed:
    def timed(self, ids, tokens):
        return 0.01, 0.02, tokens


def test_no_round_is_begun_when_the_time_is_over_and_that_is_said(capsys):
    options = argparse.Namespace(clients=1, repeats=3, max_tokens=4, seconds=1e-9)
    for seconds, rounds in ((1e-9, 1), (60, 3)):
        options.seconds = seconds
        found = serving._rounds({"a": Timed(), "b": Timed()}, [[5, 6]], options)
        assert [len(row["rounds"]) for row in found.values()] == [rounds] * 2
        assert ("over after 1 of 3 rounds" in capsys.readouterr().err) == (rounds == 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, environment):
    workdir = tmp_path_factory.mktemp("measured") / "run"
    finish(start(workdir, environment, "--config.train.num_steps=5", *DECODER_ONLY))
    return workdir


@pytest.mark.slow
def test_the_short_forms(trained, tmp_path, environment, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    given = [
        "serving",
        f"--source={trained}",
        f"--out={tmp_path}",
        "--clients=2",
        "--prompt=8",
        "--max_tokens=4",
    ]
    assert serving.main([*given, "--requests=1", "--repeats=1", "--hf=no"]) == 0, capsys.readouterr().err
    cases = json.loads((tmp_path / "serving.json").read_text())["cases"]
    assert list(cases) == ["2 slots", "1 slot"]
    for row in cases.values():
        assert row["tokens_per_second"] > 0 and 0 < row["first_token_p50_s"] <= row["request_p50_s"]
    assert serving.main([*given, "--soak=6"]) == 0, capsys.readouterr().out
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["counts"]["good: 200"] > 1 and found["wrong"] == 0 and found["slots_free_at_the_end"]
    assert any(name.startswith("bad: 400") for name in found["counts"]) and found["exit_code"] == 0
