"""Limits of `experiments.serve` and its ends: readers that leave, queue, time and token; it warms up, drains, or can't begin."""

import concurrent.futures
import json
import socket
import time

import httpx
import pytest
import serving
from serving import LIMITS, SLOTS, Running, chunks, scripted

from experiments.serve import application, server

running = serving.running  # a fixture


def test_readers_that_leave_free_their_slots(running):
    asked = json.dumps(dict(prompt="old", max_tokens=24, n=8, ignore_eos=True, stream=True)).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    running.engine.programs.pause = 0.05
    try:
        for body in (asked, asked.replace(b"true}", b"false}")):
            with socket.create_connection(("127.0.0.1", running.port)) as raw:
                raw.sendall(head % len(body) + body)
                deadline = time.monotonic() + 20
                while not running.engine.running and time.monotonic() < deadline:
                    time.sleep(0.005)
            began = time.monotonic()
            assert (
                running.idle() and time.monotonic() - began < 0.05 * 24 * 2 * 0.8
            )  # of what it would have taken
        assert running.post(prompt="old", max_tokens=1).status_code == 200
    finally:
        running.engine.programs.pause = 0.0


@pytest.fixture
def strict():
    """A server with a token and little patience, of the same programs."""
    limits = LIMITS._replace(timeout=1.0, connections=6, queue=2)
    with Running(token="s3cret", chat=False, limits=limits) as found:
        yield found.ready()


def test_limits_are_answered_with_their_status(running, strict):
    assert running.idle()  # the two share their programs
    bare = httpx.get(f"{strict.url}/v1/models")
    assert (
        bare.status_code == 401
        and bare.json()["error"]["code"] == "invalid_api_key"
        and "bearer" in bare.headers["www-authenticate"].lower()
    )
    wrong = httpx.get(f"{strict.url}/metrics", headers={"authorization": "Bearer s3cre"})
    assert wrong.status_code == 401 and httpx.get(f"{strict.url}/health").status_code == 200
    assert (
        httpx.get(f"{strict.url}/").status_code == 200
        and strict.client().get("/v1/models").status_code == 200
    )
    none = strict.post("/v1/chat/completions", messages=[{"role": "user", "content": "a"}])
    assert none.status_code == 400 and none.json()["error"]["code"] == "no_chat_template"
    strict.engine.programs.pause = 0.2
    try:
        with concurrent.futures.ThreadPoolExecutor(5) as pool:
            slow = [
                pool.submit(strict.post, prompt="old", max_tokens=24, ignore_eos=True, n=2) for _ in range(3)
            ]
            time.sleep(0.4)
            full = strict.post(prompt="old", max_tokens=2, n=2)
            assert (
                full.status_code == 429
                and full.headers["retry-after"] == "1"
                and full.json()["error"]["code"] == "queue_full"
            )
            late = [one.result() for one in slow]
        assert [one.status_code for one in late] == [504] * 3 and late[0].json()["error"]["code"] == "timeout"
        stream = strict.post(prompt="old", max_tokens=24, ignore_eos=True, stream=True)
        assert chunks(stream)[-1]["error"]["code"] == "timeout"
    finally:
        strict.engine.programs.pause = 0.0
    assert strict.idle()
    lines = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer s3cret\r\ncontent-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", strict.port), timeout=20) as raw:
        raw.sendall(lines + b'content-length: 50\r\n\r\n{"prompt": ')
        assert raw.recv(4096).startswith(b"HTTP/1.1 408")
    with socket.create_connection(("127.0.0.1", strict.port), timeout=20) as raw:
        raw.sendall(lines[:30])
        began = time.monotonic()
        assert raw.recv(4096) == b"" and time.monotonic() - began < 10
    held = [socket.create_connection(("127.0.0.1", strict.port)) for _ in range(6)]
    crowded = strict.client().get("/v1/models")
    assert crowded.status_code == 503 and crowded.json()["error"]["code"] == "too_many_connections"
    for raw in held:
        raw.close()


def test_a_server_drains():
    with Running() as found:
        found.ready()
        found.engine.programs.pause = 0.03
        try:
            with concurrent.futures.ThreadPoolExecutor(SLOTS + 2) as pool:
                asked = dict(prompt="old", max_tokens=20, ignore_eos=True)
                slow = [pool.submit(found.post, **asked, stream=n % 2 == 0) for n in range(SLOTS + 2)]
                while found.engine.running + found.engine.waiting < SLOTS + 2:
                    time.sleep(0.01)
                found.server.handle_exit(15, None)
                answers = [one.result() for one in slow]
        finally:
            found.engine.programs.pause = 0.0
        assert [one.status_code for one in answers] == [200] * len(answers)
        assert all(chunks(one)[-1]["choices"][0]["finish_reason"] == "length" for one in answers[::2])
        with pytest.raises(httpx.ConnectError):
            httpx.get(found.url)


def test_a_server_that_warms_up_says_so(monkeypatch):
    made = scripted("decoder")
    monkeypatch.setattr(made, "warm", slowly)
    with Running(made=made) as found:
        answer = found.post(prompt="old", max_tokens=1)
        health = httpx.get(f"{found.url}/health")
        assert answer.status_code == health.status_code == 503 and answer.headers["retry-after"]
        found.ready()
        assert httpx.get(f"{found.url}/health").json() == {"status": "ok"}


def test_a_server_whose_files_cannot_be_read_at_its_start_ends(monkeypatch):
    made = scripted("decoder")

    def broken():
        yield "first"
        raise OSError("expert 3 of decoder/1 is damaged")

    monkeypatch.setattr(made, "warm", broken)
    found = Running(made=made)
    inner = application.application(found.service)
    with pytest.raises(OSError, match="expert 3 of decoder/1 is damaged"):
        server.serve(found.service, inner, "", found._listener, found.notes.append)


def slowly():
    yield "first"
    time.sleep(2)
    yield "second"
