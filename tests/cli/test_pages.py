"""The board and the report as a browser shows them, and what the board's server answers."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from ossia.board.run import BoardServer, serve
from ossia.board.runs import Runs
from ossia.config import SftConfig
from ossia.errors import UsageError
from ossia.track.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def make_run(folder: Path, steps: int = 30, rate: float = 1e-4) -> Path:
    folder.mkdir(parents=True)
    SftConfig(model="some/base", learning_rate=rate).save(folder / "config.yaml")
    add(folder, range(1, steps + 1))
    return folder


def add(folder: Path, steps: range) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        for step in steps:
            row = {"step": step, "time": 1000.0 + 2 * step, "loss": None if step == 9 else 3 / step, "progress": 0.5}
            file.write(json.dumps(row | ({"eval_loss": 1.0} if step % 10 == 0 else {})) + "\n")


@pytest.fixture
def root(tmp_path) -> Path:
    make_run(tmp_path / "a" / "v0-first")
    make_run(tmp_path / "a" / "v1-zweit & <b>", 40, rate=5e-4)
    make_run(tmp_path / "c", 5)
    write_report(tmp_path / "c")
    (tmp_path / "a" / "v0-first" / "checkpoint-3").mkdir()
    shutil.copy(tmp_path / "c" / "metrics.jsonl", tmp_path / "a" / "v0-first" / "checkpoint-3")
    return tmp_path


@pytest.fixture
def board(root) -> Iterator[BoardServer]:
    with serve(root, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def get(server: BoardServer, path: str, host: str | None = None) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request("GET", path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, body, dict(answer.getheaders())


# the runs


def test_runs_are_found_summed_up_and_followed(root):
    runs = Runs(root)
    first = runs.changes()
    assert first["ids"] == ["a/v0-first", "a/v1-zweit & <b>", "c"]
    row = {one["id"]: one for one in first["runs"]}["a/v1-zweit & <b>"]
    assert (row["last"]["step"], row["last"]["loss"], row["last"]["eval_loss"]) == (40, 3 / 40, 1.0)
    assert row["options"]["learning_rate"] == 5e-4
    assert row["live"]
    assert runs.changes(first["version"])["runs"] == []
    assert runs.curves(["c"], ["loss", "nothing"], 100)["c"]["loss"]["x"] == [1, 2, 3, 4, 5]

    add(root / "c", range(6, 8))
    shutil.rmtree(root / "a" / "v0-first")
    second = runs.changes(first["version"])
    assert [(one["id"], one["last"]["step"]) for one in second["runs"]] == [("c", 7)]
    assert second["ids"] == ["a/v1-zweit & <b>", "c"]
    assert runs.curves(["c"], ["loss"], 100, by_time=True)["c"]["loss"]["x"] == [0, 2, 4, 6, 8, 10, 12]
    assert runs.csv(["c"], ["loss"]).splitlines()[:2] == ["run,step,time,loss", "c,1,1002.0,3.0"]
    with pytest.raises(KeyError):
        runs.curves(["a/v0-first"], ["loss"], 100)


def test_a_run_is_live_while_a_process_holds_it(root, held_by_another):
    def live():
        return [one["id"] for one in runs.changes()["runs"] if one["live"]]

    runs = Runs(root)
    file = root / "c" / "metrics.jsonl"
    os.utime(file, (1.0, 1.0))
    quiet = live()
    process = held_by_another(root / "c")
    assert live() == [*quiet, "c"], "a step may take longer than any time to wait"
    process.kill()
    process.wait()
    os.utime(file)
    assert live() == quiet, "killed a moment ago"


def test_a_run_without_options_or_with_broken_lines_is_shown(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "metrics.jsonl").write_text('half a line\n{"step": 3, "time": 1.0, "loss": 2.0}\n{"st')
    (tmp_path / "r" / "config.yaml").write_text("a: [")
    (row,) = Runs(tmp_path).changes()["runs"]
    assert row["last"]["loss"] == 2.0
    assert row["options"] == {}


# the server


def test_answers_and_refusals(board):
    status, page, headers = get(board, "/")
    assert status == 200
    assert "script-src 'sha256-" in page
    assert "no-store" in headers["Cache-Control"]
    name = quote("a/v1-zweit & <b>")
    status, body, _ = get(board, f"/api/curves?run={quote('a/v1-zweit & <b>', safe='')}&metric=loss&from=10&to=12")
    assert status == 404, "the server knows runs once they were listed"
    assert get(board, "/api/runs")[0] == 200
    status, body, _ = get(board, f"/api/curves?run={quote('a/v1-zweit & <b>', safe='')}&metric=loss&from=10&to=12")
    assert json.loads(body)["a/v1-zweit & <b>"]["loss"]["x"] == [9, 10, 11, 12, 13]
    assert json.loads(get(board, "/api/options?run=c")[1])["c"]["model"] == "some/base"
    status, page, headers = get(board, "/report/c")
    assert (status, headers["Content-Security-Policy"]) == (200, "sandbox allow-scripts")
    for path in (f"/report/{name}", "/report/../c", "/report/%2e%2e/c", "/api/curves?run=..&metric=loss", "/nothing"):
        assert get(board, path)[0] == 404, path
    assert get(board, "/api/runs?since=x")[0] == 400
    assert get(board, "/api/runs", host="evil.example:80")[0] == 403
    assert get(board, "/api/runs", host=f"localhost:{board.server_port}")[0] == 200


def test_wrong_folder_and_taken_port(board, ossia):
    with pytest.raises(UsageError, match="--port"):
        serve(board.runs.root, "127.0.0.1", board.server_port)
    assert "no such folder" in ossia.fails(2, "board", "nowhere")
    assert "--port is 70000" in ossia.fails(2, "board", "--port", 70000)


def test_the_command_serves_until_ctrl_c(root):
    command = [sys.executable, "-m", "ossia", "board", str(root), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == f"3 runs in {root}\n"
    assert process.stdout.readline().startswith("board: http://127.0.0.1:")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")


# in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs a Chromium on the PATH")
    from playwright.sync_api import sync_playwright

    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def page(browser) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on(
        "request",
        lambda request: (
            wrong.append(request.url)
            if "127.0.0.1" not in request.url and not request.url.startswith(("data:", "file:", "blob:"))
            else None
        ),
    )
    yield page
    page.close()
    assert wrong == []


def drawn(page: Any, selector: str) -> bool:
    """Whether anything is painted on a canvas."""
    return page.eval_on_selector(
        selector, "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(v => v)"
    )


def test_board_in_a_browser(board, page, root, tmp_path):
    page.goto(f"http://127.0.0.1:{board.server_port}/")
    page.wait_for_selector("#rows tr")
    assert page.locator("#count").text_content() == "3 of 3 runs"
    page.fill("#search", "zweit")
    assert page.locator("#rows tr").count() == 1
    page.fill("#search", "learning_rate=0.0001")
    assert page.locator("#rows tr").count() == 2
    page.fill("#search", "")
    page.click("#head th >> nth=3")
    losses = [float(text) for text in page.locator("#rows tr td:nth-child(4)").all_text_contents()]
    assert losses == sorted(losses, reverse=True)

    page.click("#rows tr[data-run='a/v1-zweit & <b>']")
    page.click("#rows tr[data-run='c']")
    page.wait_for_selector("#keys span:nth-child(2)")
    assert page.locator("#charts .panel").count() == 2, "loss and eval_loss"
    assert drawn(page, "[data-metric=loss] canvas")
    assert page.locator("#diff tr").count() == 2
    assert page.locator("#diff tr:nth-child(2) td").all_text_contents() == ["0.0005", "0.0001"]
    page.hover("[data-metric=loss]", position={"x": 500, "y": 90})
    assert "zweit" in page.locator("[data-metric=loss] .bubble").text_content()

    page.check("#log")
    page.select_option("#x", "time")
    with page.expect_download() as download:
        page.click("#charts .panel:first-child button")
    assert download.value.suggested_filename == "loss.png"
    assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")
    with page.expect_download() as download:
        page.click("#csv")
    assert len(Path(download.value.path()).read_text().splitlines()) == 1 + 39 + 5, (
        "a step without a number has no line"
    )

    add(root / "c", range(6, 80))
    page.wait_for_selector("#rows tr[data-run=c] td:nth-child(3):text-is('79')", timeout=10_000)
    link = page.locator("#rows tr[data-run=c] a")
    assert link.get_attribute("href") == "/report/c"
    page.goto(f"http://127.0.0.1:{board.server_port}/report/c")
    assert drawn(page, "[data-chart='0'] canvas")


@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (1100, "dark"), (390, "light")])
def test_report_in_a_browser(root, page, width, scheme):
    run = root / "a" / "v0-first"
    load = [[1.5, 0.5, 1.0, 1.0], [1.0, 1.0, 0.2, 1.8]]
    (run / "experts.json").write_text(json.dumps({"step": 3, "layers": [0, 1], "load": load, "base": load[::-1]}))
    file = write_report(run)
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert drawn(page, "[data-chart='0'] canvas")
    assert drawn(page, ".heat canvas")
    page.hover("[data-chart='0']", position={"x": width * 0.5, "y": 60})
    assert "loss" in page.locator("[data-chart='0'] .bubble").text_content()
    page.click("[data-heat=drift]")
    assert "largest change 0.8" in page.locator("#heat-note").text_content()
    body = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(part) for part in body[4:-1].split(",")) < 300) == (scheme == "dark")
