import base64
import json
import math
import os
import re
import warnings

import numpy as np
import pytest

from switchmoe.analysis import plots, report
from switchmoe.analysis.report import fill_ins, headline, layer_rows, write_report
from switchmoe.runs.reporting import MetricsWriter
from switchmoe.settings import Settings, to_dict

RUN = {
    "parameters": 21_345_678,
    "parameters_active": 8_123,
    "unigram_cross_entropy": 6.5,
    "matmul_peak_flops": 1.2e11,
    "platform": "cpu",
    "device": "2 x cpu",
    "versions": {"jax": "0.10.2"},
    "group_tokens": {"encoder": 4096, "decoder": 928},
    "train_seconds": 400.0,
    "compile_seconds": 21.25,
    "input_wait_share": 0.008,
    "examples": [
        {
            "input": "A <extra_id_0> & <b>bold</b> <extra_id_1> <script>alert(1)</script>",
            "target": "<extra_id_0> cat<extra_id_1> house<extra_id_3> mat",
            "prediction": "well <extra_id_0> cat<extra_id_0> dog<extra_id_1>house<extra_id_2> <i>x</i>",
        }
    ],
}


def records_of(layers, num_experts, num_steps, seed=0):
    """Training records of steps 1 ... num_steps, and a validation record of the last one."""
    rng = np.random.default_rng(seed)
    found = []
    for step in range(1, num_steps + 1):
        load_LE = rng.dirichlet(np.full(num_experts, 5.0), len(layers)) if layers else np.zeros((0,))
        routing = {
            "layers": layers,
            "layer_fraction_dropped": [0.1 / step] * len(layers),
            "layer_expert_load": load_LE.tolist(),
            "layer_router_entropy": [0.5 * math.log(num_experts)] * len(layers),
        }
        record = {"step": step, "cross_entropy": 8 - step / num_steps, "perplexity": 1000.0} | routing
        speed = {
            "tokens_per_second": 1e4 + step,
            "step_seconds": 0.4,
            "input_wait_share": 0.0,
            "peak_share": 0.5,
        }
        found.append(record | speed | {"split": "train"})
    return [*found, record | {"split": "validation", "cross_entropy": 4.0, "perplexity": 54.6}]


def directory_of(path, records, run=RUN, config=None):
    writer = MetricsWriter(path)
    for record in records:
        writer.write(record)
    writer.close()
    (path / "run.json").write_text(json.dumps(run))
    (path / "config.json").write_text(json.dumps(config or to_dict(Settings())))
    return path


def html_of(workdir):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a layout that does not fit, a mean of nothing, ...
        path = write_report(workdir)
    assert path == workdir / "report.html"
    return path.read_text(encoding="utf-8")


def pictures_in(html):
    images = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', html)]
    assert all(image.startswith(b"\x89PNG\r\n\x1a\n") for image in images)
    return images


def test_the_report_is_one_file_with_its_pictures_and_no_links_or_scripts(tmp_path):
    html = html_of(directory_of(tmp_path, records_of(["encoder/1", "decoder/1"], 4, 30)))
    names = ["expert_load.png", "loss.png", "routing.png", "speed.png"]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == names
    on_disk = {(tmp_path / "plots" / name).read_bytes() for name in names}
    assert set(pictures_in(html)) == on_disk
    assert len(re.findall(r"\ssrc=", html)) == len(names)
    assert not re.search(r"https?://|\shref=|<script|<link|@import|url\(", html)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "metrics.jsonl", "plots", "report.html", "run.json", "tensorboard"
    }  # fmt: skip


def test_text_of_examples_and_settings_is_escaped(tmp_path):
    config = to_dict(Settings()) | {"data": {"source": "<img src=x onerror=alert(1)>"}}
    html = html_of(directory_of(tmp_path / "<u>", records_of(["encoder/1"], 4, 3), config=config))
    for tag in ("<b>", "<i>", "<script", "<img src=x", "<u>", "<extra_id"):
        assert tag not in html
    assert "&lt;b&gt;bold&lt;/b&gt;" in html and "&amp;" in html
    assert "&lt;img src=x onerror=alert(1)&gt;" in html


def test_examples_have_marked_sentinels_and_fill_ins_beside_their_targets(tmp_path):
    html = html_of(directory_of(tmp_path, records_of(["encoder/1"], 4, 3)))
    rows = re.findall(r"<tr><td><mark>(.*?)</mark></td><td>(.*?)</td><td.*?>(.*?)</td></tr>", html)
    assert rows == [
        ("&lt;extra_id_0&gt;", " cat", " cat &#10003;"),
        ("&lt;extra_id_1&gt;", " house", "house"),  # would go on with the word before the sentinel
        ("&lt;extra_id_3&gt;", " mat", "—"),
        ("&lt;extra_id_2&gt;", "—", " &lt;i&gt;x&lt;/i&gt;"),
    ]
    assert "1 of these 3 spans" in html
    assert html.split("<blockquote>")[1].startswith("A <mark>&lt;extra_id_0&gt;</mark> &amp; ")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", {}),
        ("no sentinel", {}),
        ("<extra_id_0>", {0: ""}),
        ("x<extra_id_0> a b <extra_id_12>c", {0: " a b ", 12: "c"}),
        ("<extra_id_1> a<extra_id_1> b", {1: " a"}),
    ],
)
def test_fill_ins(text, found):
    assert fill_ins(text) == found


def test_headline_figures():
    records = records_of(["encoder/1"], 4, 5)
    figures = dict(headline(records, RUN, {"train": {"num_steps": 10_000}}))
    assert figures["Validation cross-entropy"].startswith("4.000 nats")
    assert figures["Validation perplexity"] == "54.6"
    assert figures["Against the baseline"] == "2.500 nats below"
    assert figures["Parameters"] == "21.35 M" and figures["Parameters a token uses"] == "8,123"
    assert figures["Steps"] == "5 of 10,000"
    assert figures["Median speed"] == "10,004 tokens/s" and figures["Median step time"] == "400 ms"
    assert figures["Share of that peak, median"] == "50.0%"
    assert figures["Waiting for input"] == "0.80% of the time"
    assert figures["Training time"] == "6m40s" and figures["Compile time"] == "21.2 s"
    worse = dict(headline(records, RUN | {"unigram_cross_entropy": 3.5}, {}))
    assert worse["Against the baseline"] == "0.500 nats above"


def test_input_wait_comes_from_the_whole_run_where_its_sums_are_known():
    records = records_of([], 1, 5)
    sums = {"train_seconds": 50.0, "input_wait_seconds": 1.0}
    assert dict(headline(records, sums, {}))["Waiting for input"] == "2.00% of the time"
    assert dict(headline(records, {}, {}))["Waiting for input"] == "0.00% of the time"
    assert dict(headline([], {}, {}))["Waiting for input"] == "not recorded"


def test_layer_rows_are_means_over_the_last_tenth_of_training_and_the_last_validation():
    def record(step, split, load_E, dropped):
        lists = {"layer_expert_load": [load_E], "layer_fraction_dropped": [dropped]}
        return {
            "step": step,
            "split": split,
            "layers": ["encoder/1"],
            "layer_router_entropy": [math.log(2)],
        } | lists

    early = [record(step, "train", [1.0, 0.0, 0.0, 0.0], 0.9) for step in range(1, 19)]
    late = [
        record(19, "train", [0.5, 0.25, 0.23, 0.02], 0.01),
        record(20, "train", [0.5, 0.15, 0.35, 0.0], 0.03),
    ]
    validations = [record(step, "validation", [1, 0, 0, 0], 0.5) for step in range(1, 20)]
    records = early + validations + late + [record(20, "validation", [0.25] * 4, 0.0)]
    assert layer_rows(records, "train") == [["2.00%", "0.04", "2.00", "1", "0.69 (50%)"]]
    assert layer_rows(records, "validation") == [["0.00%", "1.00", "1.00", "0", "0.69 (50%)"]]
    assert layer_rows(early, "validation") == []


def test_a_dense_run_has_no_routing_to_show(tmp_path):
    html = html_of(directory_of(tmp_path, records_of([], 1, 30)))
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["loss.png", "speed.png"]
    assert "a dense model has no router" in html
    assert len(pictures_in(html)) == 2


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_records_make_a_report(tmp_path, count):
    records = records_of(["encoder/1", "decoder/1"], 2, 2)[:count]
    assert len(pictures_in(html_of(directory_of(tmp_path, records)))) == (4 if count else 2)


def test_a_killed_run_says_what_was_not_recorded(tmp_path):
    directory_of(tmp_path, records_of(["encoder/1"], 4, 3)[:3])
    (tmp_path / "run.json").unlink()
    (tmp_path / "config.json").unlink()
    html = html_of(tmp_path)
    for name in ("Validation cross-entropy", "Unigram baseline", "Parameters", "Compile time", "Platform"):
        assert f"<dt>{name}</dt><dd>not recorded</dd>" in html
    assert html.count("<p>not recorded</p>") == 3  # examples, settings, versions


def test_values_that_are_not_finite_make_a_report(tmp_path):
    records = records_of(["encoder/1"], 4, 60)
    for record in records[20:25]:
        record |= {
            "cross_entropy": math.nan,
            "layer_router_entropy": [math.nan],
            "tokens_per_second": math.inf,
        }
        record["layer_expert_load"] = [[math.nan] * 4]
    assert len(pictures_in(html_of(directory_of(tmp_path, records)))) == 4


@pytest.mark.parametrize("count", [1, 2, 30])
@pytest.mark.parametrize("value", [0.0, 1.0, math.nan, math.inf])
def test_equal_values_a_single_one_and_none_at_all_make_a_report(tmp_path, count, value):
    records = records_of(["encoder/1"], 4, count)
    for record in records:
        record |= {"cross_entropy": value, "tokens_per_second": value, "input_wait_share": value}
        record |= {"layer_fraction_dropped": [value], "layer_router_entropy": [value]}
        record["layer_expert_load"] = [[value if not math.isfinite(value) else 0.25] * 4]
    assert len(pictures_in(html_of(directory_of(tmp_path, records)))) == 4


def test_pictures_do_not_follow_a_users_matplotlibrc(tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)  # needs LaTeX, which may not be there
    assert len(pictures_in(html_of(directory_of(tmp_path, records_of([], 1, 3))))) == 2


def test_experts_in_the_attention_make_a_report(tmp_path):
    layers = ["decoder/0/attention", "decoder/0", "decoder/1/attention", "decoder/1"]
    html = html_of(directory_of(tmp_path, records_of(layers, 4, 3)))
    assert all(f"<td>{layer}</td>" in html for layer in layers)


def test_many_experts_and_layers_make_a_report(tmp_path):
    layers = [f"{stack}/{block}" for stack in ("encoder", "decoder") for block in range(1, 24, 2)]
    html = html_of(directory_of(tmp_path, records_of(layers, 512, 3)))
    assert all(f"<td>{layer}</td>" in html for layer in layers)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        write_report(tmp_path)
    directory_of(tmp_path, records_of([], 1, 2))
    for text in ('{"parameters": ', "[]"):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ValueError, match=r"run\.json: not "):
            write_report(tmp_path)


def test_a_failed_write_leaves_the_older_report(tmp_path, monkeypatch):
    directory_of(tmp_path, records_of([], 1, 2))
    older = html_of(tmp_path)

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(report, "page", lambda *_: "half a page")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == older


def test_loss_curves_show_the_baseline_with_its_value():
    (axes,) = plots.loss_curves(records_of([], 1, 60), unigram=6.5).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines["unigram baseline 6.500"].get_ydata()) == {6.5}
    assert lines["validation, last 4.000"].get_xydata().tolist() == [[60, 4]]
    assert len(lines["training"].get_xdata()) == len(lines["training, smoothed"].get_xdata()) == 60


@pytest.mark.parametrize("num_experts", [2, 64])
def test_load_panels_show_multiples_of_the_fair_share(num_experts):
    records = records_of(["encoder/1", "decoder/1", "decoder/3"], num_experts, 5)[:-1]
    panels = [axes for axes in plots.expert_load(records).axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in panels] == ["encoder/1", "decoder/1", "decoder/3"]
    load_TLE = num_experts * np.array([record["layer_expert_load"] for record in records])
    for layer, axes in enumerate(panels):
        expected_TE = load_TLE[:, layer]
        if num_experts > plots.NAMED_EXPERTS:
            expected_TE = expected_TE[:, np.argsort(expected_TE[-1])]
        shown = np.asarray(axes.collections[0].get_array()).reshape(num_experts, 5)
        np.testing.assert_allclose(shown, expected_TE.T)
        assert axes.get_title(loc="right") == f"{expected_TE[-1].min():.2f}–{expected_TE[-1].max():.2f}"


def test_an_expert_without_tokens_is_not_shown_as_a_small_load():
    records = records_of(["encoder/1"], 4, 2)[:-1]
    for record in records:
        record["layer_expert_load"] = [[0.0, 0.01, 0.49, 0.5]]
    (shown,) = plots.expert_load(records).axes[0].collections
    assert np.ma.getmaskarray(shown.get_array()).reshape(4, -1).all(axis=1).tolist() == [
        True,
        False,
        False,
        False,
    ]


def test_the_median_speed_leaves_the_first_record_out():
    assert plots.median_of(np.array([100.0, 2.0, 4.0, np.nan, 3.0])) == 3.0
    assert plots.median_of(np.array([5.0])) == 5.0
    assert plots.median_of(np.array([])) is None and plots.median_of(np.array([1.0, np.nan])) is None


def test_time_is_binned_to_what_a_panel_can_show():
    num_steps = 3 * plots.MAX_COLUMNS
    records = records_of(["encoder/1"], 2, num_steps)[:-1]
    mesh = plots.expert_load(records).axes[0].collections[0]
    load_TE = 2 * np.array([record["layer_expert_load"][0] for record in records])
    shown = np.asarray(mesh.get_array()).reshape(2, plots.MAX_COLUMNS)
    np.testing.assert_allclose(shown, load_TE.reshape(plots.MAX_COLUMNS, 3, 2).mean(1).T)


def test_entropy_is_shown_with_its_greatest_value():
    figure = plots.drop_and_entropy(records_of(["encoder/1", "decoder/1"], 8, 5))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "encoder/1, decoder/1",
        "greatest entropy, ln 8 = 2.08",
    ]
    for axes in figure.axes[2:]:
        assert set(axes.lines[-1].get_ydata()) == {math.log(8)}


def test_smoothing_keeps_a_straight_line_and_skips_what_is_missing():
    line = np.linspace(0.0, 1.0, 200)
    np.testing.assert_allclose(plots.smoothed(line), line, atol=1e-12)
    np.testing.assert_allclose(plots.smoothed(np.where(np.arange(200) == 50, np.nan, 3.0)), 3.0)
    alternating = np.tile([0.0, 1.0], 100)
    assert np.ptp(plots.smoothed(alternating)[4:-4]) < 0.2


def test_last_tenth_is_at_least_one_entry_and_skips_nan():
    assert plots.last_tenth(np.array([1.0, 5.0])) == 5.0
    assert plots.last_tenth(np.arange(20.0)) == 18.5
    values = np.array([[1.0, np.nan], [3.0, np.nan]]).repeat(5, 0)
    np.testing.assert_array_equal(plots.last_tenth(values), [3.0, np.nan])
