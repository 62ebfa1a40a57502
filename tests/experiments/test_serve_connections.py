"""`experiments.serve`'s connections: what nobody reads, and who leaves."""

import socket
import time

import pytest
from serving import LIMITS, Running, Scripted


@pytest.fixture(scope="module")
def hurried():
    with Running(made=Scripted("decoder"), limits=LIMITS._replace(timeout=1.0)) as running:
        yield running.ready()


def until(what, seconds=8):
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
