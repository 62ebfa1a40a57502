"""`experiments.analyze routing`: from a run and from a server's arrays to the page; what is refused, in one line."""

import json

import numpy as np
import pytest
from test_run import finish, start

from experiments import analyze, exits
from experiments.analyze import routing
from switchmoe.analysis.routing import traces

pytestmark = pytest.mark.usefixtures("one_device")


def run(capsys, *arguments):
    code = analyze.main(["analyze", "routing", *map(str, arguments)])
    return code, capsys.readouterr()


@pytest.mark.slow
def test_a_run_its_checkpoints_and_another_step_beside_it(tmp_path, environment, capsys):
    workdir = tmp_path / "run"
    finish(start(workdir, environment, "--config.train.num_steps=10"))
    arguments = f"--source={workdir}", "--text=wiki_vital_en", "--label=topic", "--tokens=1500"
    code, captured = run(capsys, *arguments, "--saturation=True", f"--against={workdir}|5", "--share=0.2")
    assert code == 0, captured.err
    out = workdir / "routing"
    info = traces.read_info(out / "trace")
    assert info.complete and info.tokens >= 1500 and info.text == "wiki_vital_en"
    layer = traces.read_layer(out / "trace", info.layers[0])
    assert len(layer.labels) > 3 and (layer.label_N >= 0).all()
    found = json.loads((out / "figures.json").read_text())
    assert set(found["layers"]) == {str(name) for name in info.layers}
    for name, of in found["layers"].items():
        assert (
            of["label_information"]["low"]
            <= of["label_information"]["value"]
            <= of["label_information"]["high"]
        )
        # The checkpoint of step 5 is what it is against, and what saturation is of.
        assert of["agreement"]["value"] == pytest.approx(found["saturation"][name]["5"]["value"])
    heads, units, *rows = captured.out.splitlines()[:-2]
    assert heads.split()[:4] == ["layer", "busiest", "dropped", "entropy"]
    assert units.split()[:2] == ["fair", "shares"]
    assert [row.split()[0] for row in rows] == list(found["layers"])
    columns = [heads.index(head) for head in ("busiest", "dropped", "token", "matched")]
    assert all(row[at - 1] == " " and row[at].isdigit() for row in rows for at in columns), "in columns"
    assert "Saturation" in (out / "routing.html").read_text() and list((out / "plots").glob("*.png"))
    code, captured = run(capsys, f"--source={workdir}", "--text=wiki_vital_en")
    assert code == exits.EXIT_BAD_INPUT and "another model, text or setting" in captured.err


def test_experts_that_a_server_told_of(tmp_path, capsys):
    file = tmp_path / "experts.npz"
    rng = np.random.default_rng(0)
    np.savez(file, experts=rng.integers(0, 8, (400, 2, 2)), sequences=np.arange(400) // 20)
    code, captured = run(capsys, f"--trace={file}")
    assert code == 0, captured.err
    assert "8 experts are guessed" in captured.err
    heads, _, *rows = captured.out.splitlines()[:-2]
    assert [row[heads.index("first repeats") :][:3] for row in rows] == ["0.1", "0.1"]
    assert (tmp_path / "experts" / "routing" / "routing.html").exists()
    again, other = tmp_path / "experts" / "routing" / "trace", tmp_path / "again"
    code, captured = run(capsys, f"--trace={again}", f"--against={again}", f"--out={other}")
    assert code == 0, captured.err
    found = json.loads((other / "figures.json").read_text())
    assert found["layers"]["decoder/0"]["agreement"]["value"] == 1


def test_the_trace_of_a_file_is_of_that_file_as_it_is_now(tmp_path, monkeypatch, capsys):
    one, other, out = tmp_path / "one.npy", tmp_path / "other.npy", tmp_path / "out"
    read = []
    monkeypatch.setattr(
        routing, "_write", lambda directory, *_: read.append(traces.read_info(directory).tokens)
    )

    def saved(path, tokens):
        np.save(path, np.tile([0, 1], (tokens, 2, 1)))
        return run(capsys, f"--trace={path}", f"--out={out}")

    def killing(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(traces, "write_info", killing)
        assert saved(one, 30)[0] == exits.EXIT_INTERRUPTED
    assert [saved(path, tokens)[0] for path, tokens in ((one, 30), (other, 20), (other, 10))] == [0] * 3
    assert read == [30, 20, 10]
    (out / "trace" / "made_of.json").unlink()  # as traces of files were, or somebody's own
    code, captured = saved(one, 40)
    assert code == exits.EXIT_BAD_INPUT and f"{out / 'trace'} is there and was not made of it" in captured.err
    assert saved(other, 50)[0] == 0 and read[-1] == 50


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--source=: accepted is one of --source=RUN and --trace=PLACE"),
        (["--source=a", "--trace=b"], "--source=a: accepted is one of"),
        (["--source=a", "--tokens=-1"], "--tokens=-1: accepted is an integer >= 0"),
        (["--source=a", "--share=0"], "--share=0: accepted is a number above 0"),
        (["--source=a", "--split=train"], "--split=train: accepted is all or validation"),
        (["--source=a", "--saturation=yes"], "--saturation=yes: accepted is True or False"),
        (
            ["--source=a", "--text=b", "--config.data.source=c"],
            "--text=b: accepted is it or --config.data.source",
        ),
        (["--trace=a", "--label=topic"], "--label=topic: accepted with --source"),
        (["--trace=a", "--config.data.batch_size=2"], "--config.data.batch_size=2: accepted with --source"),
        (["--trace=nowhere"], "--trace=nowhere: not a trace"),
        (["--source=nowhere"], "--source=nowhere"),
        (["--source=a", "--colour=b"], "argument --colour=b: accepted are --source="),
    ],
)
def test_what_is_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, captured = run(capsys, *arguments)
    assert code == exits.EXIT_BAD_INPUT
    assert captured.err.startswith(f"{routing.COMMAND}: {message}") and captured.err.count("\n") == 1


def test_a_sweep_in_a_directory_of_that_name_is_a_sweep(tmp_path, monkeypatch, capsys):
    (tmp_path / "routing").mkdir()
    monkeypatch.chdir(tmp_path)
    assert analyze.main(["analyze", "routing"]) == exits.EXIT_BAD_INPUT
    assert (
        "experiments.analyze: " in capsys.readouterr().err
    )  # of the analysis of sweeps: there is no run in it
    assert analyze.main(["analyze", "routing", "--help"]) == 0 and "--saturation" in capsys.readouterr().out
