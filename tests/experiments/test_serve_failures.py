"""`experiments.serve` where something fails: who waits is told, and nobody waits for what will not come."""

import sys

import httpx
from serving import LIMITS, Running, Scripted

from experiments.serve import __main__ as command


def failing(*given):
    raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand more")


def refused(running):
    """Both paths say that the model can't be run."""
    health, answer = httpx.get(f"{running.url}/health"), running.post(prompt="old", max_tokens=2)
    assert health.status_code == answer.status_code == 500
    assert "RuntimeError: RESOURCE_EXHAUSTED: out of memory" in health.json()["error"]["message"]
    assert "accepted is another server" in answer.json()["error"]["message"]
    assert "retry-after" not in answer.headers


def test_a_device_that_does_not_come_back_is_told():
    made = Scripted("decoder")
    with Running(made=made, limits=LIMITS._replace(timeout=5.0)) as running:
        running.ready()
        right = made.step, made.reset
        made.step = made.reset = failing
        assert running.post(prompt="old", max_tokens=2).status_code == 500
        running.engine._thread.join(10)
        made.step, made.reset = right
        refused(running)
        assert running.notes[-1] == "the engine ended: RuntimeError: RESOURCE_EXHAUSTED: out of memory"


def test_a_model_that_could_not_be_prepared_is_no_model_that_warms_up():
    made = Scripted("decoder")
    made.warm = lambda: map(failing, ["first"])
    with Running(made=made) as running:
        running.engine._thread.join(10)
        refused(running)


def test_what_is_too_much_is_refused_before_it_is_read():
    """Too many prompts before any is tokenised, too many ids before they are text."""

    class Unread:
        eos_id = 1
        encode = decode = failing

    with Running() as running:
        running.ready()
        running.service.vocabulary = Unread()
        for prompt, message in (
            (["a"] * (LIMITS.queue + 1), "accepted are at most 16 answers in all"),
            ([3] * (LIMITS.max_prompt + 1), "it has 33 tokens; accepted are at most 32"),
            ([[3] * (LIMITS.max_prompt + 1)], "it has 33 tokens; accepted are at most 32"),
            ([0, 99999], "the id 99999: accepted is"),
        ):
            answer = running.post(prompt=prompt)
            assert answer.status_code == 400 and message in answer.json()["error"]["message"]
        assert running.post(prompt="a").status_code == 500, "there it is read"


def test_nobody_has_to_read_what_a_server_says(monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stderr", Closed())
    command._note("ready")
