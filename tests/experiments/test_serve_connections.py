"""`experiments.serve`'s connections: what nobody reads, and who leaves."""

import json
import socket
import threading
import time

import httpx
import pytest
from serving import LIMITS, Running, Scripted

from experiments.serve import application, server


@pytest.fixture(scope="module")
def hurried():
    with Running(made=Scripted("decoder"), limits=LIMITS._replace(timeout=3.0)) as running:
        yield running.ready()


def until(what, seconds=20):
    end = time.monotonic() + seconds
    while not (found := what()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def test_who_sends_many_requests_and_reads_nothing_is_let_go(hurried):
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", hurried.port))
        raw.setblocking(False)
        left, end = b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * 4000, time.monotonic() + 0.5
        while left and time.monotonic() < end:
            try:
                left = left[raw.send(left) :]
            except BlockingIOError:
                time.sleep(0.02)
        connections = hurried.server.server_state.connections
        assert until(lambda: connections), "it is there"
        assert until(lambda: not connections)


def test_a_stream_that_nobody_reads_frees_its_slots_while_its_connection_is_open(hurried):
    """What is not read is more than sockets and server keep, so that what sends it stands still; what computes does not."""
    asked = dict(
        prompt="old",
        n=16,
        max_tokens=24,
        ignore_eos=True,
        stream=True,
        logprobs=5,
        temperature=1.0,
        routed_experts=True,
    )
    body = json.dumps(asked).encode()
    connections, programs = hurried.server.server_state.connections, hurried.engine.programs
    assert until(lambda: not connections)
    hurried._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of what it accepts, too
    programs.pause = 0.005
    try:
        with socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.connect(("127.0.0.1", hurried.port))
            head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n"
            raw.sendall(head.format(len(body)).encode() + body)
            assert until(lambda: hurried.engine.running)
            assert until(lambda: not hurried.engine.running and not hurried.engine.waiting, 2)
            assert connections, "it is still open"
            assert hurried.post(prompt="old", max_tokens=3).status_code == 200
            assert until(lambda: not connections), "ended after the timeout"
    finally:
        programs.pause = 0.0


def test_who_reads_slowly_is_answered_whole(hurried):
    """A reader that stalls for less than the timeout gets all of many responses on one connection."""
    count = 60
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", hurried.port))
        ask = b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n"
        raw.sendall(ask * (count - 1) + ask.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
        got = b""
        while part := raw.recv(1 << 16):
            if len(got) // 200_000 != (len(got) + len(part)) // 200_000:
                time.sleep(0.3)
            got += part
    assert got.count(b"HTTP/1.1 200 OK") == count


def test_a_client_that_leaves_is_no_bad_request(hurried):
    hurried.engine.programs.pause = 0.1
    try:
        with hurried.client() as client, pytest.raises(httpx.TimeoutException):
            client.post(
                "/v1/completions", json=dict(prompt="old", max_tokens=20, ignore_eos=True), timeout=0.4
            )
    finally:
        hurried.engine.programs.pause = 0.0

    def told():
        lines = hurried.client().get("/metrics").text.splitlines()
        return [
            line for line in lines if line.startswith("switchmoe:http_responses_total") and "200" not in line
        ]

    assert until(told) == ['switchmoe:http_responses_total{model_name="decoder",status="499"} 1.0']


def test_a_server_that_ends_while_it_compiles_left_nobody_unanswered(monkeypatch):
    made, begun, go_on = Scripted("decoder"), threading.Event(), threading.Event()

    def warm():
        yield "a"
        begun.set()
        go_on.wait(60)
        yield "b"

    made.warm = warm
    running, right = Running(made=made), server.made

    def ending(*given):
        found = right(*given)
        threading.Thread(target=lambda: begun.wait(60) and found.handle_exit(15, None)).start()
        return found

    monkeypatch.setattr(server, "made", ending)
    inner = application.application(running.service)
    assert server.serve(running.service, inner, "", running._listener, running.notes.append)
    go_on.set()
