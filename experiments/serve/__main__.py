"""Serves a trained model over HTTP, as OpenAI's API has it: ``python -m experiments.serve --source=RUN [--OPTION=VALUE ...]``

RUN is a run's directory (its newest step), DIR|STEP or DIR/checkpoints/STEP. POST /v1/completions and /v1/chat/completions, GET
/v1/models, /health, /metrics, /openapi.json, and at / a page with a text box. Needs the extra `serve`.

  --host=ADDRESS         on which it listens (127.0.0.1: this machine alone)
  --port=N               (8000); 0: one that is free
  --slots=N              answers computed at once (8)
  --max_prompt=N         tokens of a prompt, at most (256)
  --max_tokens=N         new tokens of an answer, at most (128)
  --queue=N              answers that wait, at most, and of one request (64)
  --max_body=BYTES       of a request, at most (1000000)
  --timeout=SECONDS      of a request, of a body that comes, of a reader that stalls, of draining (120)
  --connections=N        at once (100)
  --token_file=FILE      its first line is the token that requests need; or the environment variable SWITCHMOE_TOKEN
  --name=NAME            the model's (its directory's name)
  --config.model.dtype=  float32 | bfloat16: the kernels' type (the run's)
  --expert_memory=SIZE   experts stay on disk, but for so many bytes of them (docs/offload.md), with --predictor=,
                         --expert_policy= and --expert_reads= as of experiments.generate

SIGTERM and Ctrl-C: answers those who are there, at most --timeout, then ends; a second one ends at once. A run's `chat.json`
is its chat template (docs/serving.md). Exit codes: 0 done; 2 bad input; 4 a file that can't be read, an address in use.
"""

import contextlib
import dataclasses
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import command_line, exits, expert_memory, process

COMMAND, TOKEN = "experiments.serve", "SWITCHMOE_TOKEN"
NUMBERS = {  # option: default, least, most
    "port": (8000, 0, 65535), "slots": (8, 1, 1024), "max_prompt": (256, 1, 1_000_000), "max_tokens": (128, 1, 1_000_000),
    "queue": (64, 1, 100_000), "max_body": (1_000_000, 1, 2**31), "timeout": (120.0, 0.1, 86_400), "connections": (100, 1, 100_000),
}  # fmt: skip
TEXTS = {"source": "", "host": "127.0.0.1", "token_file": "", "name": ""}
PACKAGES = ("starlette", "uvicorn", "sse_starlette", "prometheus_client")


def main(argv: Sequence[str]) -> int:
    if {"--help", "-h"} & set(argv[1:]):
        print(__doc__.strip())
        return 0
    return exits.guarded(COMMAND, lambda: _serve(*parse(argv[1:])))


def parse(arguments: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options, overrides of the config). Raises ValueError, one line that names the argument and what would be accepted."""
    overrides, given = command_line.values(
        arguments, dict.fromkeys([*TEXTS, *NUMBERS, *expert_memory.OPTIONS], "")
    )
    expert_memory.checked(given)
    found: dict[str, Any] = {name: given[name] for name in expert_memory.OPTIONS}
    found |= {name: given[name] or default for name, default in TEXTS.items()}
    for name, (default, least, most) in NUMBERS.items():
        kind = type(default)
        what = "an integer" if kind is int else "a number"
        try:
            found[name] = kind(given[name] or default)
            if not least <= found[name] <= most:
                raise ValueError
        except ValueError:
            raise ValueError(f"--{name}={given[name]}: accepted is {what} from {least} to {most}") from None
    if not found["source"]:
        raise ValueError("no model; accepted is --source=RUN")
    return found, overrides


def _serve(options: dict[str, Any], overrides: dict[str, Any]) -> int:
    try:
        for package in PACKAGES:
            __import__(package)
    except ImportError as error:
        raise ValueError(f"{error}; accepted is an environment with pip install '.[serve]'") from error
    token = _token(options["token_file"])
    listener = _listener(options["host"], options["port"])
    process.check_devices()
    from experiments.serve import application, server

    service = _service(options, overrides)
    host, port = listener.getsockname()[:2]
    where = f"[{host}]" if ":" in host else host
    _note(f"serving {service.name} at http://{where}:{port}{', with a token' if token else ''}")
    done = server.serve(service, application.application(service), token, listener, _note)
    _note("done" if done else "stopped; some requests were not answered")
    return 0


def _note(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more
        print(f"{COMMAND}: {text}", file=sys.stderr, flush=True)


def _token(file: str) -> str:
    """Raises ValueError or OSError; "" where there is none."""
    token = os.environ.get(TOKEN, "")
    where = TOKEN
    if file:
        where = f"--token_file={file}"
        try:
            lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{where}: not UTF-8; accepted is a file whose first line is the token"
            ) from error
        token = lines[0].strip() if lines else ""
    good = token.isascii() and token.isprintable() and " " not in token
    if (file or TOKEN in os.environ) and not (token and good):
        raise ValueError(f"{where}: accepted is a token of printable ASCII without blanks")
    return token


def _listener(host: str, port: int) -> socket.socket:
    """Raises OSError, one line."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise OSError(
            f"--host={host} --port={port}: {error.strerror or error}; accepted is an address that is free"
        ) from error


def _service(options: dict[str, Any], overrides: dict[str, Any]) -> Any:
    """The model, ready to be warmed up. Raises ValueError or OSError."""
    from experiments.serve import chat
    from experiments.serve.exchange import Service
    from experiments.serve.fields import Limits
    from experiments.serve.metrics import Metrics
    from switchmoe.dispatch.dispatchers import DECODING
    from switchmoe.inference.serving.engine import Engine
    from switchmoe.inference.serving.programs import Programs
    from switchmoe.routing import NOT_CAUSAL
    from switchmoe.runs import trained
    from switchmoe.settings import MeshSettings

    model = trained.find(options["source"])
    if model.vocabulary is None:
        raise ValueError(f"--source={options['source']}: it has no vocabulary; accepted is a model of text")
    settings = trained.changed(model.settings, overrides)
    settings = dataclasses.replace(settings, mesh=MeshSettings())  # one device, however it was trained
    directory = model.step.parent.parent
    file = directory / chat.FILE
    template = chat.Template.read(file.read_bytes(), str(file)) if file.exists() else None
    limits = Limits(**{name: options[name] for name in Limits._fields})
    _note(f"reading {model.step}")
    budget, how_paged = expert_memory.checked(options)
    pager = None
    if budget:
        settings, params, pager = expert_memory.opened(model, settings, budget, how_paged, _note)
    else:
        params = trained.on_one_device(model, settings)
    sizes = options["slots"], limits.max_prompt, limits.max_tokens
    programs = Programs(settings, params, *sizes, pager.check if pager else None)
    if pager:
        moe, rows = programs.settings.moe, max(programs.slots, programs.lengths[-1])
        # Rows are sorted by expert, of which one without rows is not needed; else there are buffers for each.
        sorted_rows = moe.dispatch in ("ragged", DECODING) and moe.router not in NOT_CAUSAL
        pager.holds(rows * moe.total_choices if sorted_rows else moe.total_experts)
    name = options["name"] or directory.name
    metrics = Metrics(name, programs.prompt_layers, programs.layers, settings.moe.total_experts)
    engine = Engine(programs, limits.queue, metrics, _note)
    return Service(name, engine, model.vocabulary, limits, metrics, template)


if __name__ == "__main__":
    exits.leave(COMMAND, main)
