"""The command `experiments.serve`: what it refuses, in one line, and a server as a user starts and ends it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
from test_run import DECODER_ONLY, finish, start

from experiments import exits
from experiments.serve import __main__ as serve
from experiments.serve import chat


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no model; accepted is --source=RUN"),
        (["--source=nowhere"], "accepted is a run"),
        (["--source=a", "--port=http"], "--port=http: accepted is an integer from 0 to 65535"),
        (["--source=a", "--port=70000"], "--port=70000: accepted is an integer from 0 to 65535"),
        (["--source=a", "--slots=0"], "--slots=0: accepted is an integer from 1 to 1024"),
        (["--source=a", "--timeout=nan"], "--timeout=nan: accepted is a number from 0.1 to 86400"),
        (
            ["--source=a", "--token=abc"],
            "argument --token=abc (did you mean --token_file=?): accepted are --source=",
        ),
        (["--source=a", "--queue="], "argument --queue=: accepted are"),
    ],
)
def test_what_is_refused_gets_one_line(arguments, message, capsys):
    given = [*arguments, *([] if any("port" in one for one in arguments) else ["--port=0"])]
    assert serve.main(["serve", *given]) == exits.EXIT_BAD_INPUT
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_files_and_addresses_that_are_not_there(tmp_path, capsys, monkeypatch):
    assert serve.main(["serve", "--source=a", f"--token_file={tmp_path}/none"]) == exits.EXIT_IO
    (tmp_path / "token").write_text("two words\n")
    assert serve.main(["serve", "--source=a", f"--token_file={tmp_path}/token"]) == exits.EXIT_BAD_INPUT
    monkeypatch.setenv("SWITCHMOE_TOKEN", "")
    assert serve.main(["serve", "--source=a", "--port=0"]) == exits.EXIT_BAD_INPUT
    monkeypatch.delenv("SWITCHMOE_TOKEN")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve.main(["serve", "--source=a", f"--port={port}"]) == exits.EXIT_IO
    *_, last = capsys.readouterr().err.strip().split("\n")
    assert f"--port={port}: " in last and "accepted is an address that is free" in last


def test_it_listens_on_this_machine_alone_unless_told(monkeypatch):
    asked = []

    def create_server(address, **_):
        asked.append(address)
        raise OSError("taken")

    monkeypatch.setattr(socket, "create_server", create_server)
    for given in ([], ["--host=::"]):
        assert serve.main(["serve", "--source=a", "--port=7", *given]) == exits.EXIT_IO
    assert asked == [("127.0.0.1", 7), ("::", 7)]


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"user": "a"}', '{"user": "{content}{content}"}', '{"user": "{content}", "stop": "a"}', '{"user": "{content}", "x": 1}',
     '{"user": "{content}", "stop": ["a", "b", "c", "d", "e"]}', '{"assistant": "{content}"}', '{"user": "\xe9{content}"}', '{"user": "{content}", "prompt": 5}'],
)  # fmt: skip
def test_a_template_that_is_none(text):
    with pytest.raises(ValueError, match=r"chat\.json: .*accepted is"):
        chat.Template.read(text.encode("latin-1"), "chat.json")


def test_a_template_is_data():
    found = chat.Template.read(b'{"user": "Q {content}\\n", "prompt": "A"}', "chat.json")
    evil = "{content} {{ 1 + 1 }} {0} %s {user.__class__}"
    assert found.text([{"role": "user", "content": evil}]) == f"Q {evil}\nA"
    with pytest.raises(ValueError, match="the role system: accepted are those of the model's template, user"):
        found.text([{"role": "system", "content": "a"}])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, environment):
    workdir = tmp_path_factory.mktemp("served") / "run"
    finish(start(workdir, environment, "--config.train.num_steps=5", *DECODER_ONLY))
    (workdir / "chat.json").write_text('{"user": "Q {content}\\n", "prompt": "A"}')
    return workdir


class Command:
    """The server in a process of its own."""

    def __init__(self, workdir, environment, *arguments):
        own = [
            f"--source={workdir}",
            "--port=0",
            "--slots=2",
            "--max_prompt=16",
            "--max_tokens=64",
            *arguments,
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "experiments.serve", *own],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said = []
        for line in self.process.stderr:
            self.said.append(line)
            if "serving" in line:
                self.url = line.rpartition("at ")[2].strip().split(",")[0]
            if line.endswith(": ready\n"):
                return
        raise AssertionError(self.said)

    def end(self):
        self.said += self.process.stderr.readlines()
        return self.process.wait(60)


@pytest.mark.slow
def test_a_server_from_its_start_to_its_end(trained, environment, capsys):
    served = Command(trained, environment | {"SWITCHMOE_TOKEN": "s3cret"})
    headers = {"authorization": "Bearer s3cret"}
    assert httpx.get(f"{served.url}/v1/models").status_code == 401
    card = httpx.get(f"{served.url}/v1/models", headers=headers).json()["data"][0]
    assert card["id"] == "run" and card["switchmoe"]["chat"]
    from experiments import generate

    assert generate.main(["generate", f"--source={trained}", "--prompt=The river", "--max_tokens=9"]) == 0
    wanted = capsys.readouterr().out.removesuffix("\n")
    asked = {"prompt": "The river", "max_tokens": 9, "temperature": 0}
    answer = httpx.post(f"{served.url}/v1/completions", json=asked, headers=headers, timeout=60)
    assert answer.json()["choices"][0]["text"] == wanted
    asked |= {"max_tokens": 64, "ignore_eos": True, "stream": True}
    with httpx.stream(
        "POST", f"{served.url}/v1/completions", json=asked, headers=headers, timeout=60
    ) as stream:
        lines = stream.iter_lines()
        next(lines)
        served.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
    assert served.end() == 0 and served.said[-1] == "experiments.serve: done\n"
    assert not any("Traceback" in line for line in served.said)


@pytest.mark.slow
def test_a_second_signal_ends_at_once(trained, environment):
    served = Command(trained, environment, "--max_tokens=4000")
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as raw:
        body = json.dumps({"prompt": "a", "max_tokens": 4000, "ignore_eos": True, "n": 2}).encode()
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
        raw.sendall(b"content-length: %d\r\n\r\n" % len(body) + body)
        time.sleep(0.5)
        os.kill(served.process.pid, signal.SIGINT)
        time.sleep(0.5)
        os.kill(served.process.pid, signal.SIGTERM)
        began = time.monotonic()
        assert served.end() == 0 and time.monotonic() - began < 20
    assert not any("Traceback" in line for line in served.said)


@pytest.mark.slow
def test_experts_on_disk_are_served_and_a_damaged_one_is_told(trained, environment, capsys):
    from experiments import generate

    asked = [
        "generate",
        f"--source={trained}",
        "--prompt=The river",
        "--max_tokens=9",
        "--expert_memory=1GiB",
    ]
    assert generate.main(asked) == 0
    wanted = capsys.readouterr().out.removesuffix("\n")
    files = sorted(trained.glob("experts/*/*.experts"))
    least = max(file.stat().st_size for file in files)  # so that a layer's experts leave for another's
    assert len(files) > 1
    served = Command(trained, environment, f"--expert_memory={least}")

    def answer():
        body = {"prompt": "The river", "max_tokens": 9, "temperature": 0}
        return httpx.post(f"{served.url}/v1/completions", json=body, timeout=60)

    assert answer().json()["choices"][0]["text"] == wanted
    good = {file: file.read_bytes() for file in files}
    for file, raw in good.items():
        file.write_bytes(raw[:4096] + bytes(byte ^ 1 for byte in raw[4096:]))
    broken = answer()
    assert broken.status_code == 500 and broken.json()["error"]["type"] == "server_error"
    for file, raw in good.items():
        file.write_bytes(raw)
    assert answer().json()["choices"][0]["text"] == wanted
    served.process.send_signal(signal.SIGTERM)
    assert served.end() == 0
    said = [line for line in served.said if "is damaged" in line]
    assert said and "expert " in said[0] and ".experts" in said[0]
    assert not any("Traceback" in line for line in served.said)
