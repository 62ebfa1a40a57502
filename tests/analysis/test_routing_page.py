"""The page of a trace: one small file that opens without a network, is driven by keys and shows what text says as text."""

import base64
import json
import re

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
    info = traces.read_info(place)
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
    chromium.key("p")
    chromium.run("document.getElementById('after').focus()")
    for other in ("before", "after"):  # of two pages: the button can't be pressed again
        chromium.run("document.activeElement.click()")
        assert chromium.run("document.activeElement.id") == other
    chromium.run("document.querySelector('.t').scrollIntoView({block: 'center'})")
    chromium.hover(".t")
    assert "position 0" in chromium.run("document.getElementById('detail').innerText")
    assert EVIL.replace("\u2581", "").strip() in chromium.run("document.getElementById('text').textContent")
    chromium.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000
    assert chromium.errors == []
    assert all(url.startswith(("file:", "data:")) for url in chromium.requests)
