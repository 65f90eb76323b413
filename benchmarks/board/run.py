"""How fluid `ossia board` is: many runs are made, the server asked, the page driven in headless Chromium.

    python benchmarks/board/run.py --runs 1000 --points 10000 --result benchmarks/board/results/cpu-1.json

Needs playwright and a Chromium (`--chromium PATH`, default: the one on the PATH).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import statistics
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import torch

from ossia.bench.run import measured_on
from ossia.board.run import serve
from ossia.config import SftConfig

CHOSEN = 10
FRAMES = """async () => {
  const times = [];
  for (let i = 0; i < 60; i++) {
    await new Promise(requestAnimationFrame);
    const began = performance.now();
    for (const one of charts.values()) one.chart.draw();
    times.push(performance.now() - began);
  }
  return times;
}"""


def make(folder: Path, runs: int, points: int) -> None:
    """Runs of a few different curves each, options that differ."""
    draw = random.Random(0)
    bodies = []
    for kind in range(min(runs, 12)):
        rows = []
        for step in range(1, points + 1):
            loss = 1 + 2 * math.exp(-step / points * (3 + kind / 4)) + draw.gauss(0, 0.05)
            row: dict[str, Any] = {"step": step, "time": 1.79e9 + step, "loss": loss, "learning_rate": 1e-4 / step}
            row |= {"grad_norm": abs(draw.gauss(1, 0.2)), "token_accuracy": 1 - loss / 4, "tokens_per_second": 2e4}
            rows.append(json.dumps(row | {"memory_gb": 16.5, "progress": step / points}) + "\n")
        bodies.append("".join(rows))
    for number in range(runs):
        run = folder / f"group-{number % 10}" / f"v{number}"
        run.mkdir(parents=True)
        SftConfig(
            model="openai/gpt-oss-20b", learning_rate=10 ** draw.uniform(-5, -3), lora_rank=2 ** (number % 6)
        ).save(run / "config.yaml")
        (run / "metrics.jsonl").write_text(bodies[number % len(bodies)])


def timed(url: str) -> tuple[float, int]:
    """Seconds and bytes of an answer."""
    began = time.perf_counter()
    with urllib.request.urlopen(url) as answer:
        body = answer.read()
    return time.perf_counter() - began, len(body)


def drive(url: str, chromium: str, runs: int) -> dict[str, Any]:
    """The page's times, in milliseconds."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        browser = playwright.chromium.launch(executable_path=chromium, args=options)
        page = browser.new_page(viewport={"width": 1400, "height": 900}, bypass_csp=True)
        began = time.perf_counter()
        page.goto(url)
        page.wait_for_function(
            f"document.getElementById('count').textContent.endsWith('of {runs:,} runs')", timeout=120_000
        )
        listed = time.perf_counter() - began
        search = page.evaluate(
            """() => { const box = document.getElementById("search"), began = performance.now();
                box.value = "group-3"; box.oninput(); document.body.offsetHeight;
                const first = performance.now() - began; box.value = ""; box.oninput(); document.body.offsetHeight;
                return [first, performance.now() - began - first]; }"""
        )
        sort = page.evaluate(
            """() => { const began = performance.now(); document.querySelector("#head th").click();
                document.body.offsetHeight; return performance.now() - began; }"""
        )
        began = time.perf_counter()
        for number in range(CHOSEN):
            page.click(f"#rows tr >> nth={number}")
        page.wait_for_function(
            f"[...document.querySelectorAll('#charts .panel')].length > 4 && {CHOSEN} === "
            "document.querySelectorAll('#keys span').length",
            timeout=60_000,
        )
        chosen = time.perf_counter() - began
        frames = page.evaluate(FRAMES)
        smoothing = page.evaluate(
            """() => { const began = performance.now(); document.getElementById("smoothing").value = 0.9; draw();
                return performance.now() - began; }"""
        )
        count = page.evaluate("charts.size")
        browser.close()
    frames.sort()
    return {
        "page_ms": round(1e3 * listed, 1),
        "search_to_a_tenth_and_back_ms": [round(each, 1) for each in search],
        "sort_all_ms": round(sort, 1),
        f"choose_{CHOSEN}_runs_ms": round(1e3 * chosen, 1),
        "charts": count,
        "redraw_all_charts_ms": {"median": round(statistics.median(frames), 2), "95th": round(frames[56], 2)},
        "smoothing_ms": round(smoothing, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--points", type=int, default=10_000)
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    parser.add_argument("--result")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, args.runs, args.points)
        size = sum(file.stat().st_size for file in folder.rglob("metrics.jsonl"))
        with serve(folder, "127.0.0.1", 0) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            url = f"http://127.0.0.1:{server.server_port}"
            first, bytes_listed = timed(f"{url}/api/runs")
            again, _ = timed(f"{url}/api/runs?since=1")
            wanted = "&".join(f"run=group-{n % 10}/v{n}" for n in range(20, 20 + CHOSEN))
            cold, _ = timed(f"{url}/api/curves?metric=loss&{wanted}")
            warm, bytes_curves = timed(f"{url}/api/curves?metric=loss&{wanted}")
            result: dict[str, Any] = {
                "runs": args.runs,
                "points": args.points,
                "metrics_bytes": size,
                "first_list_ms": round(1e3 * first, 1),
                "list_bytes": bytes_listed,
                "list_again_ms": round(1e3 * again, 1),
                f"curves_of_{CHOSEN}_runs_cold_ms": round(1e3 * cold, 1),
                f"curves_of_{CHOSEN}_runs_warm_ms": round(1e3 * warm, 1),
                "curves_bytes": bytes_curves,
            }
            if args.chromium:
                result["chromium"] = drive(url, args.chromium, args.runs)
            server.shutdown()
    cores = len(os.sched_getaffinity(0))
    result["environment"] = {**measured_on(torch.device("cpu")), "cores": cores}
    print(json.dumps(result, indent=1))
    if args.result:
        Path(args.result).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
