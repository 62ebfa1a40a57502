"""What the notebooks share: commands followed live, tables, pictures, sliders."""

import html
import json
import runpy
import sys

import pytest
from matplotlib.figure import Figure

from configs import quickstart
from configs.sweeps import experts_tiny
from experiments import notebooks


@pytest.fixture
def shown(monkeypatch):
    """What a cell shows, in its order; what is shown anew takes the place of what it replaces."""
    found = []

    class Place:
        def __init__(self, index):
            self.index = index

        def update(self, thing):
            found[self.index] = thing

    def display(thing, display_id=False):
        found.append(thing)
        return Place(len(found) - 1) if display_id else None

    monkeypatch.setattr(notebooks, "display", display)
    return found


def line(*heights):
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot(heights)
    return figure


def test_all_is_small_where_the_environment_says_so(monkeypatch):
    monkeypatch.delenv(notebooks.TINY, raising=False)
    assert notebooks.pick(300, 4) == 300 and notebooks.steps(0) == []
    assert "--config.train.num_steps=300" in notebooks.steps(300)
    monkeypatch.setenv(notebooks.TINY, "1")
    assert notebooks.pick(300, 4) == 4
    for count in (0, 300):
        assert "--config.train.num_steps=4" in notebooks.steps(count)


def test_a_command_leaves_its_last_line_and_its_pictures(shown, monkeypatch):
    monkeypatch.setattr(notebooks, "REDRAW", 0.0)
    monkeypatch.setattr(notebooks, "POLL", 0.01)
    drawn = []

    def pictures():
        drawn.append(len(drawn))
        return [line(0, 1), line(0, len(drawn))]

    said = notebooks.run("evaluate", "--help", pictures=pictures)
    assert said.startswith("Measures a trained model")
    assert len(drawn) > 1  # while it ran, and when it was done
    assert len(shown) == 3  # a line and two pictures, however often they were drawn
    assert html.escape(said.strip().splitlines()[-1]) in shown[0].data
    assert "experiments.evaluate --help" in shown[0].data


def test_a_conversion_that_is_there_is_not_made_again(tmp_path, monkeypatch):
    ran, needed = [], []
    monkeypatch.setattr(notebooks, "run", lambda *arguments: ran.append(arguments))
    monkeypatch.setattr(notebooks, "needs", lambda *names: needed.append(names))
    target = tmp_path / "target"
    assert notebooks.converted(tmp_path, target, "--upcycle.experts=4") == target and not needed
    assert ran == [("convert", f"--source={tmp_path}", f"--target={target}", "--upcycle.experts=4")]
    notebooks.converted("google/switch-base-8", target)
    assert needed == [("huggingface_hub", "hf")] and len(ran) == 2
    target.mkdir()
    notebooks.converted("google/switch-base-8", target)
    assert len(ran) == 2 and len(needed) == 1


def test_an_extra_is_installed_of_the_package_that_is_installed(monkeypatch):
    asked = []
    monkeypatch.setattr(notebooks.subprocess, "run", lambda command, check: asked.append(command[-1]))
    monkeypatch.setattr(notebooks.importlib.metadata, "version", lambda name: "1")
    notebooks.needs("json", "hf")
    assert asked == []
    notebooks.needs("no_such_package", "hf")
    assert asked == ["switchmoe[hf]"]

    def missing(name):
        raise notebooks.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(notebooks.importlib.metadata, "version", missing)
    with pytest.raises(RuntimeError, match=r"no_such_package: .*pip install '.\[hf\]'"):
        notebooks.needs("no_such_package", "hf")
    assert asked == ["switchmoe[hf]"]


def test_a_sweep_over_the_experts_that_are_listed(tmp_path, monkeypatch):
    monkeypatch.delenv(notebooks.TINY, raising=False)
    found = runpy.run_path(str(notebooks.experts_config(tmp_path / "mine.py", "1, 2,8")))
    assert found["get_sweep"]() == [{"moe.num_experts": [1, 2, 8]}]
    assert found["get_config"] is experts_tiny.get_config
    with pytest.raises(ValueError, match="two: accepted are integers"):
        notebooks.experts_config(tmp_path / "other.py", "1, two")
    assert not (tmp_path / "other.py").exists()


def test_a_command_that_fails_stops_the_notebook_and_says_why(shown):
    with pytest.raises(RuntimeError, match=r"exit code 2: .*experiments.evaluate(.|\n)*--source="):
        notebooks.run("evaluate")


def test_the_pictures_of_a_run_are_of_what_there_is(tmp_path):
    assert notebooks.progress(tmp_path) == []
    record = {"step": 1, "split": "train", "cross_entropy": 5.0, "layers": []}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + '\n{"step": 2, "spl')  # being written
    assert len(notebooks.progress(tmp_path)) == 1
    layer = {"layers": ["encoder/0"], "layer_expert_load": [[0.25, 0.75]]}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record | layer) + "\n")
    assert len(notebooks.progress(tmp_path)) == 2


def test_runs_side_by_side_are_named_with_their_last_loss(tmp_path):
    for name, losses in (("dense", (5.0, 4.0)), ("sparse", (5.0, 3.5))):
        (tmp_path / name).mkdir()
        records = (
            {"step": step, "split": "validation", "cross_entropy": loss} for step, loss in enumerate(losses)
        )
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    runs = {name: tmp_path / name for name in ("sparse", "dense", "absent")}
    (axes,) = notebooks.held_out(runs).axes
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["sparse, last 3.500", "dense, last 4.000", "absent"]


def test_a_table_shows_text_as_it_is(shown):
    notebooks.table([{"input": "the <extra_id_0>", "loss": 1234.5}])
    assert "the &lt;extra_id_0&gt;" in shown[0].data and "1,234.500" in shown[0].data
    notebooks.table([])
    assert len(shown) == 1


def test_a_config_is_shown_by_what_it_sets(shown):
    notebooks.settings(quickstart.get_config())
    assert "moe.router_init_stddev" in shown[0].data and "experts a token goes to" not in shown[0].data


def test_a_page_is_shown_whole(shown, tmp_path):
    (tmp_path / "page.html").write_text('<p class="x">&</p>', encoding="utf-8")
    notebooks.page(tmp_path / "page.html")
    assert 'srcdoc="&lt;p class=&quot;x&quot;&gt;&amp;&lt;/p&gt;"' in shown[0].data


def test_pictures_of_files_directories_and_figures(shown, tmp_path):
    for name in ("a", "b"):
        line(0, 1).savefig(tmp_path / f"{name}.png")
    notebooks.show(line(0, 1), tmp_path, tmp_path / "b.png")
    assert len(shown) == 4


def test_without_widgets_pictures_stand_still(shown, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    asked = []

    def draw(**chosen):
        asked.append(chosen)
        return line(0, 1)

    notebooks.sliders(draw, factor=[1.0, 0.5, 2.0], jitter=[0.0, 0.1])
    assert asked == [
        {"factor": 1.0, "jitter": 0.0},
        {"factor": 2.0, "jitter": 0.0},
        {"factor": 1.0, "jitter": 0.1},
    ]
    assert len(shown) == 3


def test_a_slider_draws_anew(shown, monkeypatch):
    ipywidgets = pytest.importorskip("ipywidgets")
    made, asked, interact = [], [], ipywidgets.interact
    monkeypatch.delenv(notebooks.TINY, raising=False)
    monkeypatch.setattr(
        ipywidgets, "interact", lambda draw, **moved: made.append(moved) or interact(draw, **moved)
    )

    def draw(**chosen):
        asked.append(chosen)
        return line(0, 1)

    notebooks.sliders(draw, factor=[1.0, 0.5, 2.0], jitter=[0.0, 0.1])
    (sliders,) = made
    assert sliders["factor"].options == (0.5, 1.0, 2.0) and sliders["factor"].value == 1.0
    sliders["factor"].value = 2.0
    assert asked == [{"factor": 1.0, "jitter": 0.0}, {"factor": 2.0, "jitter": 0.0}]


def test_the_recorded_sweep_comes_with_the_package(shown):
    rows = notebooks.read_csv(
        notebooks.RESULTS / "experts_tiny" / "points.csv", ("num_experts", "loss", "starved")
    )
    assert [row["num_experts"] for row in rows] == [2**n for n in range(10)]
    assert isinstance(rows[0]["loss"], float) and rows[0]["starved"] == ""
    notebooks.law(notebooks.RESULTS / "experts_tiny" / "fit.json")
    told = "".join(thing.data for thing in shown)
    assert "E_start" in told and "log10 L" in told and "one model size" in told
