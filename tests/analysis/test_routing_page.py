"""The page of a trace: one small file that opens without a network, is driven by keys and shows what text says as text."""

import base64
import dataclasses
import json
import re
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from switchmoe.analysis.routing import arrays, page, pictures, summary, traces

EVIL = '\u2581</script><script>throw 1</script>"&@DATA@'


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """3,000 tokens of two requests each of 100, two layers, two of twelve experts, some dropped, as if from a server."""
    place = tmp_path_factory.mktemp("page")
    rng = np.random.default_rng(0)
    expert_TLK = np.array([[rng.permutation(12)[:2] for _ in range(2)] for _ in range(3000)])
    pieces = [EVIL, "\u2581the", "ing", ",", "<extra_id_0>"]
    token_T = rng.integers(0, 5, 3000)
    sequence_T = np.arange(3000) // 100
    arrays.write(place, expert_TLK, token_T, rng.random(expert_TLK.shape), sequence_T, pieces=pieces)
    path = next(iter(traces.parts(place)))
    info = dataclasses.replace(traces.read_info(place), sentinels=(4, 5))
    traces.write_info(place, info)
    layers = [traces.read_layer(place, name) for name in info.layers]
    for layer in layers:
        layer.kept_NK[3, 0] = False
    traces.write_part(path, layers)
    return place


@pytest.fixture(scope="module")
def made(directory):
    """The page's file."""
    found = summary.figures(directory)
    path = directory / "routing.html"
    path.write_text(
        page.page(directory, found, pictures.save_all(found, directory / "plots")), encoding="utf-8"
    )
    return path


def test_it_is_one_file_that_asks_for_nothing(made):
    text = made.read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!data:)', text) and "http" not in re.sub(
        r"base64,[^\"]*", "", text
    )
    assert text.count("<script") == 2 and "throw 1</script>" not in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert data["tokens"] == 3000 and EVIL in data["pieces"]
    for title in ("Load", "Repeats", "Co-activation and the next layer", "Beside: Mixtral, Table 5"):
        assert f"<h2>{title}</h2>" in text
    beside = text[text.index("<h2>Beside: ST-MoE, Table 14</h2>") :].partition("<h2>Beside: Mixtral")[0]
    assert "2.2, 1.8, 1.6, 1.7, 1.7, 1.2" in beside and "sentinel entropy, nats" in text
    assert "experts of a layer the first" not in text  # twelve are all listed
    assert "12 (guessed: the largest index and one), 2" in text
    assert text.count("shuffled") > 10 and text.count("<figure>") >= 4


def test_a_page_of_many_tokens_layers_and_pictures_is_below_five_megabytes(tmp_path):
    """What experts like best, pictures, and ids written in many letters are in it as well as the tokens."""
    rng = np.random.default_rng(0)
    expert_TLK = rng.integers(0, 32, (22_000, 8, 8))
    pieces = [letter * 80 for letter in "abcdefgh\u20ac"]
    token_T, sequence_T = rng.integers(0, 9, 22_000), np.arange(22_000) // 50
    info = arrays.write(tmp_path, expert_TLK, token_T, sequence_T=sequence_T, pieces=pieces)
    picture = tmp_path / "picture.png"
    picture.write_bytes(rng.bytes(900_000))
    text = page.page(tmp_path, {"layers": {}, "says": {}, "units": {}}, [(picture, "noise")])
    assert 4_500_000 < len(text.encode()) < 5_000_000
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert 5_000 < data["tokens"] < 20_000 and text.count("<summary>decoder/") == 8
    tokens, data = page._fitting(tmp_path, info, pieces, 100_000)  # whatever else there is
    assert tokens > 100 and len(data) <= 100_000


def test_a_page_of_few_layers_has_all_tokens_that_it_may(tmp_path):
    rng = np.random.default_rng(0)
    expert_TLK = rng.integers(0, 128, (22_000, 4, 2))
    info = arrays.write(tmp_path, expert_TLK, sequence_T=np.arange(22_000) // 50)
    data = page.explored(tmp_path, info, [])
    assert data["tokens"] == 20_000 and len(json.dumps(data)) < 4_200_000


def test_how_many_layers_the_page_has_room_for():
    text = (Path(__file__).parents[2] / "docs" / "routing_traces.md").read_text(encoding="utf-8")
    told = re.findall(r"(\d+) x (\d+)[, ]", re.search(r"choices of a token: (.*?)\(up to 254", text)[1])
    assert [int(choices) for _, choices in told] == [1, 2, 4, 8]
    for layers, choices in ((int(one), int(other)) for one, other in told):
        fits = [page.token_bytes(layers + more, choices, False) * page.MOST_TOKENS for more in (0, 1)]
        assert fits[0] <= page.MOST_BYTES < fits[1]


def test_the_page_says_that_it_lists_some_of_many_experts(tmp_path):
    info = arrays.write(tmp_path, np.arange(2000).reshape(1000, 1, 2) % 100)
    text = page.page(tmp_path, {"layers": {}, "says": {}, "units": {}}, [])
    assert info.num_experts == 100 and "Of the 100 experts of a layer the first 64 are listed." in text


def test_numbers_on_coloured_and_striped_tokens_can_be_read():
    """WCAG's contrast of text of this size is 4.5 at least, of every expert's colour and of the stripes on it."""
    text = resources.files("switchmoe.analysis.routing").joinpath("page.html").read_text(encoding="utf-8")
    colours = json.loads(re.search(r"COLOURS = (\[.*?\])", text)[1])
    dark = json.loads(re.search(r"DARK = new Set\((\[.*?\])\)", text)[1])
    on_dark, on_light, alpha = re.search(
        r'rgba\(\$\{DARK\.has\(e % 8\) \? "([\d,]+)" : "([\d,]+)"\},(\.\d+)\)', text
    ).groups()
    for number, colour in enumerate(colours):
        plain = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
        stripe = np.array((on_dark if number in dark else on_light).split(","), float) / 255
        striped = (1 - float(alpha)) * plain + float(alpha) * stripe
        ink = np.full(3, float(number in dark))
        assert min(contrast(ink, plain), contrast(ink, striped)) >= 4.5, colour
        assert contrast(plain, striped) > 1.15, colour  # a stripe is seen
    assert len(colours) == 8 and contrast(np.zeros(3), np.ones(3)) == pytest.approx(21)


def contrast(one, other):
    light = []
    for colour in (one, other):
        linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
        light.append(linear @ [0.2126, 0.7152, 0.0722] + 0.05)
    return max(light) / min(light)


def test_gates_above_one_are_shown_as_they_are(tmp_path):
    """What experts' outputs are multiplied by need not be a probability."""
    gate_TLK = np.random.default_rng(0).random((200, 1, 2)) * 3
    info = arrays.write(tmp_path, np.tile([0, 1], (200, 1, 1)), gate_TLK=gate_TLK)
    (layer,) = page.explored(tmp_path, info, [])["layers"]
    shown = np.frombuffer(base64.b64decode(layer["gate"]["b64"]), np.uint8) * layer["gateTop"] / 255
    np.testing.assert_allclose(shown, gate_TLK.ravel(), atol=3 / 255 / 2 + 1e-6)


def test_a_browser_opens_it_switches_layers_and_filters(chromium, made, directory, tmp_path):
    chromium.open(made)
    info = traces.read_info(directory)
    first, second = (traces.read_layer(directory, name) for name in info.layers)
    shown = chromium.run("document.querySelectorAll('#text .t').length")
    assert shown == 1500 and chromium.run("document.querySelectorAll('#legend button').length") == 12
    token = "document.querySelector('.t[data-row=\"3\"]')"
    assert chromium.run(f"{token}.classList.contains('lost')")
    assert "dropped" in chromium.run(f"{token}.getAttribute('aria-label')")
    text = chromium.run(f"{token}.querySelector('sub').textContent")
    assert text == str(first.expert_NK[3, 0])

    chromium.run("document.querySelector('.t[tabindex=\"0\"]').focus()")
    for _ in range(3):
        chromium.key("ArrowRight")
    assert chromium.run("document.activeElement.dataset.row") == "3"
    assert "position 3" in chromium.run("document.getElementById('detail').innerText")
    chromium.key("]")
    assert chromium.run("document.getElementById('layer').value") == "1"
    assert chromium.run("document.activeElement.dataset.row") == "3"  # where the reader was
    assert chromium.run(f"{token}.querySelector('sub').textContent") == str(second.expert_NK[3, 0])

    chromium.key("[")
    assert chromium.run("document.getElementById('layer').value") == "0"
    assert chromium.run(f"{token}.querySelector('sub').textContent") == str(first.expert_NK[3, 0])
    chromium.key("]")

    for key in ("1", "1", "Enter"):
        chromium.key(key)
    assert chromium.run("document.activeElement.dataset.row") == "3"
    wanted = int((second.expert_NK[:1500] == 11).any(axis=1).sum())
    assert chromium.run("document.querySelectorAll('#text .t:not(.off)').length") == wanted
    assert f"{wanted} of 1500 tokens go to expert 11" in chromium.run(
        "document.getElementById('count').textContent"
    )
    chromium.key("Escape")
    chromium.key("n")
    assert chromium.run("document.querySelector('#text .t').dataset.row") == "1500"
    assert chromium.run("document.activeElement.dataset.row") == "1500"  # the page's first
    chromium.run("document.getElementById('legend').children[2].focus()")
    chromium.run("document.activeElement.click()")
    assert chromium.run("document.activeElement.dataset.expert") == "2"
    assert (
        chromium.run("document.getElementById('legend').children[2].getAttribute('aria-pressed')") == "true"
    )
    for key, pressed in ((" ", "false"), ("Enter", "true")):  # as any button
        chromium.key(key)
        assert chromium.run("document.activeElement.dataset.expert") == "2"
        assert chromium.run("document.activeElement.getAttribute('aria-pressed')") == pressed
    chromium.key("p")
    chromium.run("document.getElementById('after').focus()")
    for other in ("before", "after"):  # of two pages: the button can't be pressed again
        chromium.run("document.activeElement.click()")
        assert chromium.run("document.activeElement.id") == other
    chromium.run("document.querySelector('.t').scrollIntoView({block: 'center'})")
    chromium.hover(".t")
    assert "position 0" in chromium.run("document.getElementById('detail').innerText")
    assert EVIL.replace("\u2581", "").strip() in chromium.run("document.getElementById('text').textContent")
    chromium.run(f"{token}.scrollIntoView({{block: 'center'}})")
    chromium.hover('.t[data-row="3"]')
    lines = chromium.run("document.getElementById('detail').innerText").splitlines()
    assert any(line.startswith("position 3,") for line in lines)
    cells = [line.split("\t")[1:4] for line in lines if "\t" in line]
    for layer in (first, second):  # of both of its choices the gate; the first one has no slot
        for choice, lost in enumerate(("dropped", "")):
            assert [str(layer.expert_NK[3, choice]), f"{layer.gate_NK[3, choice]:.2f}", lost] in cells, lines
    chromium.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000
    assert chromium.errors == []
    assert all(url.startswith(("file:", "data:")) for url in chromium.requests)
