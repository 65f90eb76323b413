"""The chat page in a real browser."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from tests.served import scripted

sync = pytest.importorskip("playwright.sync_api", reason="no playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
MARKDOWN = """# Plan

Some **bold**, *soft*, `a < b` and a [link](https://example.org).

1. one
2. two
   - nested
3. three

```py
print("<b>hi</b>")
```

| a | b |
|---|---|
| 1 | **2** |

> quoted

<img src=x onerror="window.bad=1"><script>window.bad=1</script><style>body{display:none}</style>
[x](javascript:window.bad=1) [y](data:text/html,x) **<svg onload=window.bad=1>**"""
SAID = f"say <|channel|>analysis<|message|>A list, <b>short</b>.<|end|><|start|>assistant<|channel|>final<|message|>{MARKDOWN}<|return|>"


@pytest.fixture(scope="module")
def browser():
    with sync.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS.split()])


@pytest.fixture
def page(browser, server):
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(15_000)
    page.problems = []
    page.asked = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda line: page.problems.append(line.text) if line.type == "error" else None)
    page.on("request", lambda request: page.asked.append(request))
    page.goto(server.url + "/")
    page.wait_for_selector("#model option >> nth=1", state="attached")
    yield page
    assert page.problems == []
    assert all(request.url.startswith(server.url) for request in page.asked)
    context.close()


def ask(page, text):
    page.fill("#ask", text)
    page.press("#ask", "Enter")


def done(page):
    page.wait_for_selector("#log[aria-busy=false]")


def sent(page):
    return [request.post_data_json for request in page.asked if request.method == "POST"]


def test_the_policy_lets_in_nothing_else(server):
    import urllib.request

    with urllib.request.urlopen(server.url + "/") as answer:
        policy, text = answer.headers["Content-Security-Policy"], answer.read().decode()
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"""(src|href)=["'](?!data:,)""", text)


def test_markdown_is_drawn_and_html_is_text(page):
    ask(page, SAID)
    done(page)
    text = page.locator(".text")
    assert text.locator("h1").inner_text() == "Plan"
    assert text.locator("strong").first.inner_text() == "bold"
    assert text.locator("ol > li").all_inner_texts()[0] == "one"
    assert text.locator("ol > li > ul > li").inner_text() == "nested"
    assert text.locator("pre code").inner_text() == 'print("<b>hi</b>")'
    assert text.locator("td strong").inner_text() == "2"
    assert text.locator("blockquote").inner_text() == "quoted"
    assert [link.get_attribute("href") for link in text.locator("a").all()] == ["https://example.org"]
    assert text.locator("img, script, style, svg").count() == 0
    assert '<img src=x onerror="window.bad=1">' in text.inner_text()
    assert page.evaluate("window.bad") is None
    assert page.locator(".thought").is_hidden()
    page.click("summary")
    assert page.locator(".thought").inner_text() == "A list, <b>short</b>."


def test_settings_reach_the_server_and_history_is_kept(page):
    page.click("#more")
    page.select_option("#effort", "high")
    page.fill("#system", "Be kind.")
    page.fill("#tokens", "50")
    page.locator("#temperature").fill("0.2")
    ask(page, "one")
    done(page)
    ask(page, "two")
    done(page)
    body = sent(page)[-1]
    assert (body["model"], body["reasoning_effort"], body["temperature"], body["max_completion_tokens"]) == (
        "tuned",
        "high",
        0.2,
        50,
    )
    assert [(m["role"], m["content"]) for m in body["messages"]] == [
        ("system", "Be kind."),
        ("user", "one"),
        ("assistant", "tuned: one"),
        ("user", "two"),
    ]
    page.click("#new")
    ask(page, "three")
    done(page)
    assert [m["content"] for m in sent(page)[-1]["messages"]] == ["Be kind.", "three"]


def test_two_models_side_by_side(page):
    page.select_option("#beside", "base")
    for question in ("hi", "again"):
        ask(page, question)
        done(page)
    answers = page.locator(".answers >> nth=0").locator(".answer")
    assert answers.locator(".who b").all_inner_texts() == ["tuned", "base"]
    assert answers.locator(".text").all_inner_texts() == ["tuned: hi", "base: hi"]
    assert [[m["content"] for m in body["messages"]] for body in sent(page)[2:]] == [
        ["hi", f"{name}: hi", "again"] for name in ("tuned", "base")
    ]
    boxes = [answer.bounding_box() for answer in answers.all()]
    assert boxes[0]["y"] == boxes[1]["y"]
    page.set_viewport_size({"width": 380, "height": 700})
    boxes = [answer.bounding_box() for answer in answers.all()]
    assert boxes[1]["y"] > boxes[0]["y"]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop(page, server, how):
    ask(page, "slow 2000")
    page.wait_for_selector(".text:has-text('xx')")
    server.until("ossia_running", 1)
    if how == "button":
        page.click("#send:has-text('Stop')")
    else:
        page.press("#ask", "Escape")
    done(page)
    assert page.locator(".note").inner_text() == "Stopped."
    server.until("ossia_running", 0)


def test_what_goes_wrong_is_said(page):
    ask(page, "fail")
    done(page)
    assert "the engine failed" in page.locator(".wrong").inner_text()
    ask(page, "ok")
    done(page)
    assert [m["content"] for m in sent(page)[-1]["messages"]] == ["ok"]


def test_a_key_is_asked_for(browser, tiny_gpt_oss):
    with scripted(tiny_gpt_oss, env={"OSSIA_API_KEY": "s3cret"}) as server:
        page = browser.new_page()
        page.goto(server.url + "/")
        page.wait_for_selector("#key:visible")
        assert "needs an API key" in page.locator("#log").inner_text()
        page.fill("#key", "s3cret")
        page.press("#key", "Tab")
        page.wait_for_selector("#model option >> nth=1", state="attached")
        ask(page, "hi")
        done(page)
        page.wait_for_selector(".text:has-text('tuned: hi')")
        assert page.evaluate("JSON.stringify([localStorage, sessionStorage, document.cookie])") == '[{},{},""]'
        page.close()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 390)])
def test_pictures(browser, server, tmp_path, scheme, width):
    """Pictures for people, and that light and dark differ."""
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.goto(server.url + "/")
    page.wait_for_selector("#model option >> nth=1", state="attached")
    ask(page, SAID)
    done(page)
    path: Path = tmp_path / f"{scheme}.png"
    page.screenshot(path=path)
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", back))) > 380) is (scheme == "light")
    assert path.stat().st_size > 10_000
    page.close()
