"""What is lost with fewer bits is what the integers themselves lose; what was measured is not measured again."""

import dataclasses
import json

import numpy as np
import pytest
from test_slim import CONFIG, WORDS, write_run

from experiments import exits
from experiments.offload import widths
from experiments.offload.__main__ import main
from switchmoe.data import vocabulary
from switchmoe.interop import slim
from switchmoe.runs import measuring, sensitivity, slimming, trained
from switchmoe.settings import from_config

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run's directory with random parameters, of 2 sparse layers of 4 experts."""
    directory, rng = tmp_path_factory.mktemp("widths"), np.random.default_rng(0)
    lines = [f"{n} {' '.join(rng.choice(WORDS, 6))}" for n in range(150)]
    (directory / "text.txt").write_text("\n".join(lines))
    data = CONFIG["data"] | {"source": str(directory / "text.txt"), "validation_share": 0.2}
    write_run(directory / "run", from_config(CONFIG | {"data": data}), vocabulary.train(lines, 300))
    return directory / "run"


@pytest.fixture
def rounded(source, tmp_path):
    model = trained.find(str(source))
    ruler = measuring.yardstick(model, "", "", {}, 4, tmp_path, lambda _: None)
    return model, ruler, sensitivity.Rounded(model, ruler)


def every(bits):
    return {layer: np.full(4, bits) for layer in range(2)}


@pytest.mark.parametrize("bits", [8, 4])
def test_all_rounded_is_the_model_of_integers(rounded, source, tmp_path, bits):
    model, ruler, found = rounded
    assert found.layers == ["encoder/0", "decoder/0"] and found.kernels[0] == [(16, 24), (24, 16)]
    assert found.groups[1] == {8: 0, 4: 8, 2: 8}
    slim.make(
        model,
        tmp_path / "slim",
        slimming.Slimming(bits=bits),
        slim.asked(model, slimming.Slimming(bits=bits), {}),
        dict,
    )
    integers = trained.find(str(tmp_path / "slim"))
    wanted = measuring.figures(integers, dataclasses.replace(ruler, counted=ruler.held_out))["records"][
        "validation"
    ]
    own = found.loss(ruler.held_out, every(0))
    assert found.loss(ruler.held_out, {}) == own
    loss = found.loss(ruler.held_out, every(bits))
    assert loss == pytest.approx(float(wanted["cross_entropy"]), rel=1e-5) and loss != own


def test_fewer_bits_lose_more_and_an_expert_alone_less_than_all(rounded):
    """A model of random numbers may become better by chance, so changes are compared."""
    _, ruler, found = rounded
    own = found.loss(ruler.held_out, {})
    change = {bits: abs(found.loss(ruler.held_out, every(bits)) - own) for bits in (8, 4, 2)}
    assert change[8] < change[4] < change[2]
    alone = found.loss(ruler.held_out, {1: np.array([0, 0, 8, 0])})
    assert 0 < abs(alone - own) < change[2]


def test_what_was_measured_is_kept(tmp_path):
    path = tmp_path / "losses.jsonl"
    kept = sensitivity.Kept(path, {"of": ("a", 1)})
    kept["one"], kept["two"] = 1.25, 2.5
    whole = path.read_text()
    path.write_text(whole[:-3])  # as a kill leaves it
    kept = sensitivity.Kept(path, {"of": ("a", 1)})
    assert "one" in kept and kept["one"] == 1.25 and "two" not in kept
    kept["two"] = 2.5
    assert path.read_text() == whole
    with pytest.raises(ValueError, match="--target=.*of another model, text or number of batches"):
        sensitivity.Kept(path, {"of": ("b", 1)})
    path.write_text('{"of": ["a"')  # killed at its first line
    sensitivity.Kept(path, {"of": ("a", 1)})["one"] = 1.25
    assert path.read_text().splitlines() == whole.splitlines()[:2]


def run(capsys, *arguments):
    code = main(["offload", "widths", *map(str, arguments)])
    return code, capsys.readouterr()


def test_the_command_chooses_within_the_loss_and_goes_on(source, tmp_path, capsys, monkeypatch):
    target, calls = tmp_path / "widths", []
    measure = sensitivity.Rounded.loss

    def loss(self, batches, bits):
        calls.append(bits)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return measure(self, batches, bits)

    monkeypatch.setattr(sensitivity.Rounded, "loss", loss)
    speed, speeds = widths._speed, []

    def timed(model, where, forms):
        """Of two bits alone, as each form compiles a program."""
        speeds.append(forms)
        two = forms != "float32" and {form for of in forms.values() for form in of} == {"int2"}
        return speed(model, where, forms) if two else 1.0

    monkeypatch.setattr(widths, "_speed", timed)
    arguments = f"--source={source}", f"--target={target}", "--batches=4", "--loss=0.01"
    assert run(capsys, *arguments)[0] == exits.EXIT_INTERRUPTED
    code, captured = run(capsys, *arguments)
    assert code == 0, captured.err
    assert len((target / "losses.jsonl").read_text().splitlines()) - len(speeds) == len(
        calls
    )  # the first line is no loss, one call was none
    bits = json.loads((target / "widths.json").read_text())["bits"]
    assert list(bits) == ["encoder/0", "decoder/0"] and all(len(of) == 4 for of in bits.values())
    table = {row["experts"]: row for row in json.loads((target / "table.json").read_text())["rows"]}
    assert (
        table["int2"]["bytes"]
        <= table["chosen"]["bytes"]
        <= table["int8"]["bytes"]
        < table["float32"]["bytes"]
    )
    assert (
        len(speeds) >= 4
        and table["int2"]["tokens_per_second"] not in (0, 1)
        and not (target / "measured").exists()
    )
    assert captured.out.splitlines()[0] == "| experts | bytes | held-out loss | rise | tokens/s |"
    kept = sensitivity.Kept(
        target / "losses.jsonl", json.loads((target / "losses.jsonl").read_text().splitlines()[0])
    )
    chosen = "chosen_on " + " ".join("".join(map(str, of)) for of in bits.values())
    assert kept[chosen] <= kept["chosen_on float"] * 1.01
    count = len(calls), len(speeds)
    code, again = run(capsys, *arguments)
    assert (
        code == 0 and again.out == captured.out and (len(calls), len(speeds)) == count
    )  # nothing is measured twice


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--target=t"], "no source; accepted is --source=, a run with experts"),
        (["--source=nowhere", "--target=t"], "--source=nowhere"),
        (["--source=RUN"], "no target"),
        (["--source=RUN", "--target=RUN"], "--target="),
        (["--source=RUN", "--target=t", "--loss=-1"], "--loss=-1: accepted is a number >= 0"),
        (["--source=RUN", "--target=t", "--batches=1"], "--batches=1: accepted is an integer >= 2, or 0"),
        (["--source=RUN", "--target=t", "--text=nowhere.txt"], ""),
    ],
)
def test_what_is_refused(source, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, captured = run(capsys, *(argument.replace("RUN", str(source)) for argument in arguments))
    assert code == exits.EXIT_BAD_INPUT
    assert captured.err.startswith(f"experiments.offload widths: {message}") and captured.err.count("\n") == 1
    assert not (tmp_path / "t").exists()
