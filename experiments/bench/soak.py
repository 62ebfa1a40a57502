"""Good, bad and broken clients at one server for a while: see `experiments.bench.serving`."""

import argparse
import collections
import json
import random
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

GROWTH = 5.0  # MiB a minute, beyond which memory is not flat
SEEN = 60.0  # seconds, at least, of which that is said
HEAD = (
    "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n"
)
BAD = [  # a request and its status
    ({"prompt": "a", "temperature": -1}, 400), ({"prompt": []}, 400), ({"prompt": "a", "n": 10**9}, 400), ({}, 400),
    ({"prompt": "a", "model": "other"}, 404), ({"prompt": "a", "max_tokens": -4}, 400), ({"prompt": "a " * 5000}, 400),
    ({"prompt": "a" * 1_100_000}, 413), ({"prompt": "a", "best_of": 3}, 400),
]  # fmt: skip
BUSY = (429, 503)  # due under load


class Soak:
    """What was asked and answered."""

    def __init__(self, server: Any, prompts: list[list[int]], tokens: int):
        self.server, self._prompts, self._tokens = server, prompts, tokens
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self._wanted: dict[int, list] = {}
        self._lock = threading.Lock()

    def note(self, what: str, due: bool, told: str = "") -> None:
        with self._lock:
            self.counts[what] += 1
            if not due:
                self.wrong.append(f"{what}: {told}"[:300])

    def good(self, draw: random.Random) -> None:
        """An answer is the one that the first such request got, whatever goes on beside."""
        number = draw.randrange(len(self._prompts))
        asked = {
            "prompt": self._prompts[number],
            "max_tokens": self._tokens,
            "temperature": 0,
            "logprobs": 1,
            "return_token_ids": True,
        }
        status, body = self.server.ask("POST", "/v1/completions", asked)
        if status in BUSY:
            self.note(f"good: {status}", True)
            time.sleep(0.05)
            return
        found = json.loads(body)["choices"] if status == 200 else None
        with self._lock:
            wanted = self._wanted.setdefault(number, found)
        self.note("good: 200", found is not None and found == wanted, f"{status} {body[:150]!r}")

    def bad(self, draw: random.Random) -> None:
        asked, wanted = draw.choice(BAD)
        try:
            status, body = self.server.ask("POST", "/v1/completions", asked)
        except (BrokenPipeError, ConnectionResetError):  # refused before the body was sent
            self.note("bad: refused early", wanted == 413)
            return
        self.note(
            f"bad: {status}", status in (wanted, *BUSY) and b'"error"' in body, f"{asked!r:.80} {status}"
        )

    def broken(self, draw: random.Random) -> None:
        body = json.dumps(
            {"prompt": "the", "max_tokens": self._tokens, "stream": True, "ignore_eos": True, "n": 2}
        ).encode()
        kind = draw.choice(["left a stream", "half a body", "no HTTP", "half a head", "read nothing"])
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=30) as raw:
            try:
                if kind == "no HTTP":
                    raw.sendall(bytes(draw.randrange(256) for _ in range(200)) + b"\r\n\r\n")
                    raw.recv(4096)
                elif kind == "half a head":
                    raw.sendall(HEAD.format(10).encode()[: draw.randrange(1, 40)])
                else:
                    cut = draw.randrange(len(body)) if kind == "half a body" else len(body)
                    raw.sendall(HEAD.format(len(body)).encode() + body[:cut])
                    if kind == "left a stream":
                        raw.recv(1024)
                    elif kind == "read nothing":
                        time.sleep(draw.random() * 2)
            except OSError:
                pass  # the server may end such a connection at any time
        self.note(f"broken: {kind}", True)


def growth(memory: list[tuple[float, float]]) -> float | None:
    """MiB a minute in the second half of (seconds, MiB); None: it lasted too short for that to be known."""
    if memory[-1][0] - memory[0][0] < SEEN - 2:
        return None
    second = np.array(memory[len(memory) // 2 :])
    return float(np.polyfit(second[:, 0], second[:, 1], 1)[0] * 60)


def main(server: Any, prompts: list[list[int]], options: argparse.Namespace, made_by: dict[str, str]) -> int:
    """Asks a server that is ready, and ends it; ``made_by`` is said in its file; see `experiments.bench.serving`."""
    memory: list[tuple[float, float]] = []
    test = Soak(server, prompts, options.max_tokens)
    end = time.monotonic() + options.soak

    def client(action: Callable[[random.Random], None], seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < end:
            try:
                action(draw)
            except Exception as error:
                test.note("client failed", False, f"{type(error).__name__}: {error}")
                time.sleep(0.2)

    actions = [
        (test.good, options.clients // 2),
        (test.bad, options.clients // 4 or 1),
        (test.broken, options.clients // 4 or 1),
    ]
    work = [(action, 100 * k + n) for k, (action, count) in enumerate(actions) for n in range(count or 1)]
    threads = [threading.Thread(target=client, args=one, daemon=True) for one in work]
    for thread in threads:
        thread.start()
    began, told = time.monotonic(), time.monotonic()
    while time.monotonic() < end and server.process.poll() is None:
        memory.append((time.monotonic() - began, server.memory()))
        if time.monotonic() - told > 30:
            told = time.monotonic()
            print(
                f"{told - began:.0f} s: {sum(test.counts.values())} requests, {memory[-1][1]:.0f} MiB",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(1)
    for thread in threads:
        thread.join(60)
    alive = server.process.poll() is None
    deadline, idle = time.monotonic() + 60, False
    while alive and not idle and time.monotonic() < deadline:
        text = server.ask("GET", "/metrics")[1].decode()
        idle = not any(
            float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line.startswith(("vllm:num_requests_running", "vllm:num_requests_waiting"))
        )
        time.sleep(0.2)
    code = server.close() if alive else server.process.returncode
    slope = growth(memory)
    found = made_by | {
        "seconds": options.soak, "counts": dict(sorted(test.counts.items())), "wrong": len(test.wrong), "examples": test.wrong[:10],
        "memory_mib": [round(memory[0][1]), round(memory[-1][1])], "mib_per_minute": None if slope is None else round(slope, 3), "slots_free_at_the_end": idle,
        "exit_code": code,
    }  # fmt: skip
    (options.out / "soak.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    return 0 if alive and idle and code == 0 and not test.wrong and (slope or 0) < GROWTH else 1
