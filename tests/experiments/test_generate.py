"""`experiments.generate`: prompts in, text or ids out, in order; both kinds of models; what is refused."""

import io
import json
import sys

import pytest
from test_run import DECODER_ONLY, finish, start

from experiments import exits, generate

pytestmark = pytest.mark.usefixtures("one_device")
KINDS = {"encoder_decoder": ["--config.data.objective=prefix_lm"], "decoder_only": DECODER_ONLY}


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory, environment):
    workdir = tmp_path_factory.mktemp(request.param) / "run"
    finish(start(workdir, environment, "--config.train.num_steps=5", *KINDS[request.param]))
    return workdir


def run(capsys, *arguments):
    code = generate.main(["generate", *arguments])
    return code, capsys.readouterr()


def test_prompts_in_answers_out_in_the_order_asked(trained, tmp_path, capsys):
    prompts = ["The river", "A", "In the year of the war the king of the land", "The river"]
    given = [f"--source={trained}", "--max_tokens=4", "--batch_size=3"]
    file, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    code, captured = run(capsys, *given, f"--file={file}", f"--out={out}")
    assert code == 0, captured.err
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == prompts
    first, again = answers[0], answers[3]  # in another batch, whose sums may round otherwise
    assert first | {"score": 0} == again | {"score": 0}
    assert first["score"] == pytest.approx(again["score"], rel=1e-4)
    assert all(0 < len(answer["ids"]) <= 4 for answer in answers)
    assert all(answer["score"] < 0 for answer in answers) and not list(tmp_path.glob("*.part"))
    code, captured = run(capsys, *given, *(f"--prompt={text}" for text in prompts))
    assert code == 0 and captured.out.splitlines() == [answer["text"] for answer in answers]
    assert captured.err.startswith("compiling and generating ...\n"), "said before, not after, the wait"


def test_ids_in_ids_out_and_beams(trained, tmp_path, capsys, monkeypatch):
    given = [f"--source={trained}|5", "--max_tokens=3", "--ids", "--beams=2", "--stop=7"]
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"ids": [0, 5, 9]}\n0 5 9\n'))
    code, captured = run(capsys, *given)
    assert code == 0, captured.err
    one, other = (json.loads(line) for line in captured.out.splitlines())
    assert (
        one["ids"] == other["ids"]
        and one["prompt"] == [0, 5, 9]
        and all(type(token) is int for token in one["ids"])
    )
    code, captured = run(capsys, *given, "--prompt=0 5 9", "--config.model.dtype=bfloat16")
    assert code == 0 and json.loads(captured.out)["score"] == pytest.approx(one["score"], rel=0.05)


def test_what_is_refused_gets_one_line(trained, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "good"}\n{"text": "bad"}\n')
    (tmp_path / "out.jsonl").write_text("kept")
    for arguments, message in (
        (["--source=nowhere", "--prompt=a"], "accepted is a run"),
        ([], "no model; accepted is --source=RUN"),
        (["--max_tokens=0"], "--max_tokens=0: accepted is an integer >= 1"),
        (["--temperature=hot"], "--temperature=hot: accepted is a number >= 0"),
        (["--top_k=4", "--prompt=a"], "--top_k=4: accepted with --temperature= above 0"),
        (["--top_p=0.5", "--prompt=a"], "--top_p=0.5: accepted with --temperature= above 0"),
        (["--seed=99999999999999999999"], "accepted is an integer from 0 to 2**31 - 1"),
        (["--length_penalty=-200"], "--length_penalty=-200: accepted is a number from -10 to 10"),
        (["--stop=99999", "--prompt=a"], "--stop=99999: accepted is a token's id, below"),
        (["--prompt=caf\udce9"], "a prompt that is not Unicode; accepted is UTF-8"),
        (["--top_p=2", "--prompt=a"], "top_p=2.0: accepted is a number > 0, at most 1"),
        (["--beams=2", "--temperature=1", "--prompt=a"], "beams=2: accepted with a temperature is 1"),
        ([f"--file={bad}"], 'bad.jsonl, line 2: {"text": "bad"}: accepted is {"prompt": "TEXT"}'),
        (["--prompt=1 x", "--ids"], "accepted with --ids are integers"),
        (["--prompt=1 99999", "--ids"], "id 99999: accepted is an integer from 0 to"),
        (["--prompt=a", f"--out={tmp_path}"], "accepted is a file in a directory that is there"),
        (["--prompt=a", "--config.model.d_model=32"], "--config.model.d_model=32: it is of the model"),
        (["--colour=red"], "argument --colour=red: accepted are --source="),
    ):
        source = [] if not arguments or arguments[0].startswith("--source") else [f"--source={trained}"]
        code, captured = run(capsys, *source, *arguments)
        assert code == exits.EXIT_BAD_INPUT and message in captured.err, captured.err
        assert captured.err.count("\n") == 1 and captured.out == ""
    assert run(capsys, f"--source={trained}", f"--file={tmp_path}/none.txt")[0] == exits.EXIT_IO
    assert (tmp_path / "out.jsonl").read_text() == "kept"
