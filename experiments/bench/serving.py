"""Measures a server: ``python -m experiments.bench serving --source=RUN [--OPTION=VALUE ...]``

Over loopback, with so many clients at once: `experiments.serve` with as many slots as clients, with one slot, and (with transformers and
torch installed, extra `hf`) a plain loop that answers one request after the other with transformers' `generate`, with the same weights
(`experiments.convert`). Rounds are interleaved; ratios are medians within rounds. Prompts are random ids, all answers have
--max_tokens tokens. After --seconds no round is begun, which is said. Writes serving.json into --out and prints a table: tokens a second, and percentiles of the time to the first token and
of a request.

--soak=SECONDS instead asks one server for so long: good requests, whose answers are compared with the first ones, bad ones, and clients
that break (leave a stream, send half a body, read nothing, speak no HTTP). Tells what was answered and the server's memory; exit code 1 where
an answer was not as due, or memory grew by more than 5 MiB a minute in the second half (said of a minute or more).

Exit codes: 0 done; 1 not as due; 2 bad input; 4 a file that can't be written or read.
"""

import argparse
import concurrent.futures
import contextlib
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments import exits
from experiments.bench import soak, tools

SERVE, PLAIN = "experiments.serve", "experiments.bench.plain_server"
START = 900  # seconds that a server has to get ready


def parse(argv: list[str]) -> argparse.Namespace:
    parser = tools.Parser(
        "experiments.bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    positive = tools.at_least(1)
    parser.add_argument("what", choices=("serving",))
    parser.add_argument("--source", required=True, help="a run's directory")
    parser.add_argument("--clients", type=positive, default=16)
    parser.add_argument("--requests", type=positive, default=2, help="of each client in a round (2)")
    parser.add_argument("--repeats", type=positive, default=3, help="rounds (3)")
    parser.add_argument("--seconds", type=positive, default=1800, help="after which no round is begun (1800)")
    parser.add_argument("--prompt", type=tools.at_least(2), default=64, help="tokens of a prompt (64)")
    parser.add_argument("--max_tokens", type=positive, default=64, help="of an answer (64)")
    parser.add_argument("--hf", choices=("auto", "no"), default="auto")
    parser.add_argument("--soak", type=positive, default=0, help="seconds")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    return exits.guarded("experiments.bench", lambda: _measure(parse(argv), argv))


class Served:
    """A server in a process of its own."""

    def __init__(self, module: str, *arguments: str):
        self._log = tempfile.TemporaryFile("w+")
        command = [sys.executable, "-m", module, *arguments, "--port=0"]
        self.process = subprocess.Popen(command, stderr=self._log, stdout=subprocess.DEVNULL)
        self.port = 0

    def ready(self) -> None:
        """Raises ValueError with what the server said, if it does not get ready."""
        deadline = time.monotonic() + START
        while time.monotonic() < deadline and self.process.poll() is None:
            self._log.seek(0)
            said = [
                line.split(":")[-1]
                for line in self._log.read().splitlines()
                if "serving" in line and "http" in line
            ]
            if said:
                self.port = int(said[0].split(",")[0])
                with contextlib.suppress(OSError):
                    if self.ask("GET", "/health")[0] == 200:
                        return
            time.sleep(0.2)
        raise ValueError(f"a server did not get ready: {self.last_line()}")

    def last_line(self) -> str:
        self._log.seek(0)
        return "".join(self._log.read().strip().splitlines()[-1:])

    def ask(self, method: str, path: str, body: Any = None, timeout: float = 600) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"content-type": "application/json"} if content else {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def timed(self, ids: list[int], tokens: int) -> tuple[float, float, int]:
        """Seconds to the first token and to the last, and how many came."""
        asked = {
            "prompt": ids,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        began, first, count = time.perf_counter(), 0.0, 0
        try:
            connection.request(
                "POST", "/v1/completions", json.dumps(asked), {"content-type": "application/json"}
            )
            answer = connection.getresponse()
            if answer.status != 200:
                raise ValueError(f"a request was answered with {answer.status}: {answer.read()[:200]!r}")
            for line in answer:
                if line.startswith(b"data: {"):
                    first = first or time.perf_counter() - began
                    count += len(json.loads(line[6:])["choices"][0]["token_ids"])
        finally:
            connection.close()
        return first, time.perf_counter() - began, count

    def memory(self) -> float:
        """Resident, in MiB."""
        with open(f"/proc/{self.process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def close(self) -> int:
        self.process.terminate()
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


@contextlib.contextmanager
def running(servers: dict[str, Served]) -> Iterator[dict[str, Served]]:
    try:
        for server in servers.values():
            server.ready()
        yield servers
    finally:
        for name, server in servers.items():
            if server.process.poll():
                print(
                    f"{name}: ended with {server.process.returncode}: {server.last_line()}", file=sys.stderr
                )
            server.close()


def serve(options: argparse.Namespace, slots: int, *more: str) -> Served:
    own = [f"--slots={slots}", f"--max_prompt={options.prompt}", f"--max_tokens={options.max_tokens}"]
    return Served(
        SERVE, f"--source={options.source}", *own, f"--connections={4 * options.clients + 20}", *more
    )


def _measure(options: argparse.Namespace, argv: list[str]) -> int:
    from switchmoe.runs import trained

    rows = trained.find(options.source).settings.data.vocab_size
    options.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, rows, (options.clients * options.requests, options.prompt)).tolist()
    if options.soak:
        asked = serve(options, max(2, options.clients // 2), "--timeout=20", "--queue=12")
        with running({"the server": asked}):
            return soak.main(asked, prompts, options, tools.origin(argv))
    found = tools.origin(argv) | {"machine": tools.machine()}
    with tempfile.TemporaryDirectory() as directory:
        cases = {f"{options.clients} slots": serve(options, options.clients), "1 slot": serve(options, 1)}
        if options.hf == "auto":
            cases |= _plain(options.source, Path(directory))
        with running(cases):
            found["cases"] = _rounds(cases, prompts, options)
    path = options.out / "serving.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, row in found["cases"].items():
        times = ", ".join(f"{key} {row[key]:.2f}" for key in row if key.endswith("_s"))
        print(f"{name:14} {row['tokens_per_second']:8.1f} tokens/s, {row['ratio']:.2f} of the last; {times}")
    print(path)
    return 0


def _plain(source: str, directory: Path) -> dict[str, Served]:
    """The loop with transformers' `generate`, where it can be run."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        return {}
    target = directory / "converted"
    command = [
        sys.executable,
        "-m",
        "experiments.convert",
        f"--source={source}",
        f"--target={target}",
        "--check=False",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"no plain loop: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return {}
    return {"plain loop": Served(PLAIN, f"--source={target}")}


def _rounds(
    cases: dict[str, Served], prompts: list[list[int]], options: argparse.Namespace
) -> dict[str, Any]:
    speeds: dict[str, list[float]] = {name: [] for name in cases}
    times: dict[str, list[tuple[float, float, int]]] = {name: [] for name in cases}
    names, end = list(cases), time.monotonic() + options.seconds
    with concurrent.futures.ThreadPoolExecutor(options.clients) as pool:
        for name in names:  # a round that is not counted
            cases[name].timed(prompts[0], options.max_tokens)
        for n in range(options.repeats):
            if n and time.monotonic() > end:
                print(
                    f"--seconds={options.seconds:g}: over after {n} of {options.repeats} rounds; the table is of these",
                    file=sys.stderr,
                    flush=True,
                )
                break
            for name in names[n % len(names) :] + names[: n % len(names)]:
                began = time.perf_counter()
                done = list(
                    pool.map(lambda ids, name=name: cases[name].timed(ids, options.max_tokens), prompts)
                )
                speeds[name].append(sum(count for *_, count in done) / (time.perf_counter() - began))
                times[name] += done
                print(
                    f"round {n + 1} of {options.repeats}: {name}: {speeds[name][-1]:.1f} tokens/s",
                    file=sys.stderr,
                    flush=True,
                )
    found = {}
    for name in names:
        row: dict[str, Any] = {"tokens_per_second": float(np.median(speeds[name])), "rounds": speeds[name]}
        row["ratio"] = float(np.median(np.array(speeds[name]) / np.array(speeds[names[-1]])))
        for title, column in (("first_token", 0), ("request", 1)):
            values = [one[column] for one in times[name]]
            row |= {f"{title}_p{p}_s": float(np.percentile(values, p)) for p in (50, 90, 99)}
        found[name] = row
    return found
