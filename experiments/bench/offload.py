"""Experts on disk under a memory limit: ``python -m experiments.bench offload --out=DIR [--OPTION=VALUE ...]``

A synthetic sparse model (or --source=RUN) whose experts are four times the limit generates one answer at a time, drawn with
temperature 1. Cases: resident (no limit), ours (by form, predictor, way of reading and policy), a plain map of the float32 file read by the
same program, and transformers with accelerate's disk offload, where these are installed. Each case of each round is a process
of its own, in a memory cgroup that holds its code, its cache and its page cache; the page cache is dropped before. Rounds are
interleaved; what is told are medians, and whether the answers were the resident model's.

The synthetic router's columns have lengths of a log-normal distribution, so that some experts are chosen more: how much is told.

  --out=DIR            offload.json, and the model and its files, which a second run finds there
  --source=RUN         a run instead
  --stacks=...         encoder_decoder (the default) | decoder_only (a Qwen3-MoE of two choices, all of whose layers are sparse)
  --d_model, --d_ff, --layers (per stack), --experts, --skew    of the synthetic model (512, 2048, 6, 128, 0.5)
  --limit=SIZE         (a quarter of the experts in float32)
  --expert_memory=SIZE of which is for experts (the limit without code and other weights, CODE)
  --tokens, --answers, --rounds    new tokens of an answer, answers measured of each case and round, rounds (64, 4, 3)
  --cases="A;B"        those alone; of ours FORM, PREDICTOR, WAY, POLICY
  --tiny               small, without a limit: to see that it runs

Exit codes: 0 done; 2 bad input; 4 a file that can't be written or read.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments import exits, process
from experiments.bench import tools

COMMAND = "experiments.bench"
CODE = 520 * 2**20  # of a process, with what it takes to make a program, beside weights
TORCH = 480 * 2**20  # what torch and transformers take more
FIELDS = "form", "predictor", "way", "policy"
CASES = {  # name: of these fields
    "resident float32": ("float32", "", "", ""),
    "resident int4": ("int4", "", "", ""),
    "float32, none, direct, lru": ("float32", "none", "direct", "lru"),
    "float32, none, direct, lfu": ("float32", "none", "direct", "lfu"),
    "float32, none, direct, lfru": ("float32", "none", "direct", "lfru"),
    "float32, router, direct, lfu": ("float32", "router", "direct", "lfu"),
    "float32, router, direct, lfru": ("float32", "router", "direct", "lfru"),
    "float32, table, direct, lfu": ("float32", "table", "direct", "lfu"),
    "float32, table, direct, lfru": ("float32", "table", "direct", "lfru"),
    "float32, none, pread, lru": ("float32", "none", "pread", "lru"),
    "float32, none, mmap, lru": ("float32", "none", "mmap", "lru"),
    "int4, none, direct, lru": ("int4", "none", "direct", "lru"),
    "int4, none, direct, lfru": ("int4", "none", "direct", "lfru"),
    "int4, router, direct, lfru": ("int4", "router", "direct", "lfru"),
    "mixed, none, direct, lru": ("mixed", "none", "direct", "lru"),
    "plain mmap": ("float32", "mapped", "", ""),
    "accelerate": ("float32", "accelerate", "", ""),
}
KEYS = (  # of what became of experts, medians of which are told
    "hits", "megabytes_per_token", "waited", "right", "ahead_megabytes_per_token", "useful_megabytes_per_token", "useful", "peak",
)  # fmt: skip
CHILD = "--child="


def parse(argv: list[str]) -> argparse.Namespace:
    parser = tools.Parser(COMMAND, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    positive = tools.at_least(1)
    parser.add_argument("what", choices=("offload",))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", default="")
    parser.add_argument("--stacks", choices=("encoder_decoder", "decoder_only"), default="encoder_decoder")
    parser.add_argument("--tiny", action="store_true")
    for name, default in (("d_model", 512), ("d_ff", 2048), ("layers", 6), ("experts", 128), ("tokens", 64), ("answers", 4), ("rounds", 3)):  # fmt: skip
        parser.add_argument(f"--{name}", type=positive, default=default)
    parser.add_argument("--skew", type=float, default=0.5)
    parser.add_argument("--limit", default="")
    parser.add_argument("--expert_memory", default="")
    parser.add_argument("--cases", type=_cases, default=list(CASES))
    found = parser.parse_args(argv)
    for name in found.cases:
        if name not in CASES:
            parser.error(f"--cases={name}: accepted, with ; between them, are {'; '.join(CASES)}")
    if found.tiny:
        small = dict(d_model=32, d_ff=64, layers=4, experts=20, tokens=6, answers=1, rounds=1)
        for name, value in small.items():
            if getattr(found, name) == parser.get_default(name):
                setattr(found, name, value)
    return found


def _cases(text: str) -> list[str]:
    """Those of ours were named without a policy where that was lru."""
    return [f"{name}, lru" if f"{name}, lru" in CASES else name for name in text.split(";")]


def main(argv: list[str]) -> int:
    if {"--help", "-h"} & set(argv):
        print(__doc__.strip())
        return 0
    if argv[1:2] and argv[1].startswith(CHILD):
        return exits.guarded(COMMAND, lambda: _child(json.loads(argv[1].removeprefix(CHILD))))
    options = parse(argv)
    return exits.guarded(COMMAND, lambda: _bench(options, argv))


def _bench(options: argparse.Namespace, argv: list[str]) -> int:
    process.check_devices()
    from experiments.bench import offload_model
    from experiments.expert_memory import checked

    options.out.mkdir(parents=True, exist_ok=True)
    model = offload_model.made(options)
    facts = offload_model.facts(model)
    limit = 0 if options.tiny else _size(options.limit) or facts["expert_bytes"] // 4
    budget = checked({"expert_memory": options.expert_memory})[0]
    budget = budget or (facts["expert_bytes"] // 2 if options.tiny else limit - facts["other_bytes"] - CODE)
    if budget < 1:
        raise ValueError(
            f"--limit={limit}: accepted is more than {facts['other_bytes'] + CODE}, for code and the other weights"
        )
    group = Group.made(limit) if limit else None
    dropped, rows = False, {name: [] for name in options.cases}
    told = {"tokens": options.tokens, "answers": options.answers, "budget": budget, "out": str(options.out)}
    table = _run({"learn": True, "model": str(model), "form": "float32"} | told, None)
    for _ in range(options.rounds):
        for name in options.cases:
            asked = {"model": str(model)} | dict(zip(FIELDS, CASES[name], strict=True)) | told
            if limit and name == "accelerate":
                asked["budget"] = max(2**20, budget - TORCH)
            dropped = _drop_caches()
            found = _run(asked, None if name.startswith("resident") else group)
            rows[name].append(found)
            print(f"{name:26s} {_line(found)}", flush=True)
    machine = tools.machine() | {"cgroup": group.kind if group else "none", "page cache dropped": dropped}
    result = tools.origin(argv) | {
        "machine": machine, "model": facts, "routing": table,
        "limit": limit, "expert_memory": budget, "rows": [_row(name, found, rows) for name, found in rows.items()], "runs": rows,
    }  # fmt: skip
    path = options.out / "offload.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(
        f"{machine['processor']}, {machine['cores']} cores; limit {limit / 2**20:,.0f} MiB, of which {budget / 2**20:,.0f} for experts"
    )
    for row in result["rows"]:
        print(_told(row))
    print(path)
    return 0


def _size(text: str) -> int:
    from experiments.expert_memory import checked

    return checked({"expert_memory": text})[0] if text else 0


class Group:
    """A memory cgroup, of either version, which a process enters at its start."""

    def __init__(self, path: Path, kind: str, limit: int):
        self.path, self.kind, self._limit = path, kind, limit

    @classmethod
    def made(cls, limit: int) -> "Group":
        """Raises OSError, one line: no right to."""
        root = Path("/sys/fs/cgroup")
        first = (root / "memory").is_dir()
        path = (root / "memory" if first else root) / "switchmoe-bench"
        found = cls(path, "v1" if first else "v2", limit)
        try:
            found._made()
        except OSError as error:
            raise OSError(f"{found.path}: {error.strerror}; a memory limit takes root") from error
        return found

    def _made(self) -> None:
        self.path.mkdir(exist_ok=True)
        name = "memory.limit_in_bytes" if self.kind == "v1" else "memory.max"
        (self.path / name).write_text(str(self._limit))

    def begin(self) -> None:
        """Forgets the peak, and what files the process before has left in memory."""
        if self.kind == "v1":
            for name in ("memory.force_empty", "memory.max_usage_in_bytes"):
                (self.path / name).write_text("0")
        else:  # whose peak is only forgotten with the group
            self.path.rmdir()
            self._made()

    def peak(self) -> int:
        file = self.path / ("memory.max_usage_in_bytes" if self.kind == "v1" else "memory.peak")
        return int(file.read_text()) if file.exists() else 0


def _drop_caches() -> bool:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def _run(asked: dict[str, Any], group: Group | None) -> dict[str, Any]:
    """What a process says of a case; {"failed": its last line} where it could not."""
    enters = None
    if group:
        group.begin()
        procs = group.path / "cgroup.procs"
        enters = lambda: procs.write_text(str(os.getpid()))  # noqa: E731
    command = [sys.executable, "-m", "experiments.bench", "offload", CHILD + json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=enters)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"failed": "killed at the limit" if done.returncode == -9 else why}
    return json.loads(lines[-1]) | ({"peak": group.peak()} if group else {})


def _row(name: str, found: list[dict[str, Any]], rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of a case over its rounds, beside the resident model of the same round."""
    good = [one for one in found if "failed" not in one]
    if not good:
        return {"case": name, "failed": found[-1]["failed"] if found else "not asked"}
    form = CASES[name][0]
    row: dict[str, Any] = {
        "case": name,
        "tokens_per_second": statistics.median(one["tokens_per_second"] for one in good),
    }
    for against in ("resident float32", "resident int4"):
        pairs = [
            one["tokens_per_second"] / other["tokens_per_second"]
            for one, other in zip(found, rows.get(against, []), strict=False)
            if "failed" not in one and "failed" not in other
        ]
        if pairs:
            row[f"of {against}"] = statistics.median(pairs)
        resident = rows.get(f"resident {form}", [])
    row["same_answers"] = all(
        one["answers"] == other.get("answers") for one, other in zip(good, resident, strict=False)
    ) if resident else None  # fmt: skip
    for key in KEYS:
        values = [one[key] for one in good if one.get(key) is not None]
        if values:
            row[key] = statistics.median(values)
    return row


def _line(found: dict[str, Any]) -> str:
    return found.get("failed") or f"{found['tokens_per_second']:.1f} tokens/s"


def _told(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['case']:26s} {row['failed']}"
    parts = [f"{row['tokens_per_second']:8.1f} tokens/s"]
    parts += [f"{row[key]:.2f} {key}" for key in ("of resident float32", "of resident int4") if key in row]
    if "hits" in row:
        parts.append(
            f"{row['hits']:.1%} at hand, {row['megabytes_per_token']:.2f} MB read a token, {row['waited']:.0%} waiting"
        )
    if "right" in row:
        parts.append(
            f"{row['right']:.1%} of what was foreseen asked for,"
            f" {row['useful_megabytes_per_token']:.2f} of {row['ahead_megabytes_per_token']:.2f} MB read ahead a token used"
        )
    if row["same_answers"] is not None:
        parts.append("answers the same" if row["same_answers"] else "answers NOT the same")
    return f"{row['case']:26s} {', '.join(parts)}"


def _child(asked: dict[str, Any]) -> int:
    from experiments.bench import offload_model

    process.check_devices()
    found = offload_model.learnt(asked) if asked.get("learn") else offload_model.measured(asked)
    print(json.dumps(found))
    return 0
