"""The server's page in Chromium: it is typed into, tokens come in the colours of their experts, and text is only ever text."""

import re
import time

import httpx
import serving

from experiments.serve import page

running = serving.running  # a fixture
EVIL = '<img src=x onerror="window.evil=1"><script>window.evil=1</script>'


def wait(chromium, script, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if chromium.run(script):
            return
        time.sleep(0.05)
    raise AssertionError(f"never: {script}; {chromium.run('document.body.innerText')}; {chromium.errors}")


def fill(chromium, **values):
    for name, value in values.items():
        chromium.run(f"document.getElementById({name!r}).value = {value!r}")


def test_the_page_is_one_file_that_may_load_nothing(running):
    answer = httpx.get(f"{running.url}/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and policy.count("sha256-") == 2
    text = page.FILE.read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!data:)', text) and "innerHTML" not in text and "http" not in text


def test_tokens_come_in_the_colours_of_their_experts(chromium, running, tmp_path):
    chromium.open(running.url)
    wait(chromium, "document.getElementById('layer').options.length === 1")
    running.engine.programs.pause = 0.05
    try:
        chromium.run("document.getElementById('prompt').focus()")
        for letter in "old":
            chromium.key(letter)
        fill(chromium, max_tokens="24", temperature="1.5", seed="4", top_p="1")
        chromium.run("document.getElementById('send').click()")
        seen = set()
        for _ in range(600):
            seen.add(chromium.run("document.querySelectorAll('.t').length"))
            if not chromium.run("document.getElementById('send').disabled"):
                break
            time.sleep(0.02)
        assert len(seen) > 5  # as it comes, not at the end
    finally:
        running.engine.programs.pause = 0.0
    asked = dict(
        prompt="old", max_tokens=24, temperature=1.5, seed=4, routed_experts=True, return_token_ids=True
    )
    choice = running.post(**asked).json()["choices"][0]
    shown = chromium.run(
        "[...document.querySelectorAll('.t')].flatMap(t => [...t.childNodes]).filter(n => n.nodeType === 3).map(n => n.data).join('')"
    )
    assert shown == choice["text"]
    numbers = chromium.run("[...document.querySelectorAll('.t sub')].map(t => +t.textContent)")
    assert numbers == [token[0][0] for token in choice["routed_experts"]]
    colours = chromium.run(
        "[...document.querySelectorAll('.t')].map(t => getComputedStyle(t).backgroundColor)"
    )
    assert len(set(colours)) == len(set(numbers)) and len(set(zip(colours, numbers, strict=True))) == len(
        set(numbers)
    )
    assert "tokens in" in chromium.run("document.getElementById('state').textContent")
    chromium.run("document.querySelector('.t').focus()")
    chromium.key("ArrowRight")
    assert chromium.run("document.activeElement.dataset.number") == "1"
    assert f"id {choice['token_ids'][1]}" in chromium.run("document.getElementById('detail').textContent")
    chromium.hover(".t")
    wait(
        chromium,
        f"document.getElementById('detail').textContent.includes('token 1, id {choice['token_ids'][0]}')",
    )
    chromium.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000
    assert chromium.errors == [] and all(url.startswith((running.url, "data:")) for url in chromium.requests)


def test_it_stops_says_what_is_wrong_and_shows_text_as_text(chromium, running):
    chromium.open(running.url)
    wait(chromium, "document.getElementById('layer').options.length === 1")
    running.engine.programs.pause = 0.2
    try:
        fill(chromium, prompt="old")
        chromium.run("document.getElementById('send').click()")
        wait(chromium, "document.querySelectorAll('.t').length > 0")
        chromium.key("Escape")
        wait(chromium, "document.getElementById('state').textContent.startsWith('stopped after')")
        assert running.idle()
    finally:
        running.engine.programs.pause = 0.0
    before = len(chromium.errors)
    fill(chromium, prompt=EVIL, max_tokens="2")
    chromium.run("document.getElementById('send').click()")
    wait(chromium, "document.getElementById('state').className === 'bad'")
    assert "accepted are at most 32" in chromium.run("document.getElementById('state').textContent")
    assert (
        chromium.run("window.evil") is None and chromium.run("document.querySelectorAll('img').length") == 0
    )
    assert [error.get("source") for error in chromium.errors[before:]] in ([], ["network"])  # the 400 itself


def test_it_asks_for_a_token_where_one_is_needed(chromium, running):
    assert running.idle()
    with serving.Running(token="s3cret") as strict:
        strict.ready()
        chromium.open(strict.url)
        wait(chromium, "!document.getElementById('token_label').hidden")
        fill(chromium, token="s3cret", prompt="old", max_tokens="2")
        chromium.run("document.getElementById('token').dispatchEvent(new Event('change'))")
        wait(chromium, "document.getElementById('layer').options.length === 1")
        chromium.run("document.getElementById('send').click()")
        wait(chromium, "document.getElementById('state').textContent.includes('tokens in')")
