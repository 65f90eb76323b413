"""What is shown of a run: curves, the report, the panel, the share of a card's rate."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ossia.config import SftConfig
from ossia.model.sizes import SIZES
from ossia.track import RunInfo
from ossia.track.files import note
from ossia.track.jsonl import JsonlTracker
from ossia.track.report import ReportTracker, write_report
from ossia.track.series import MetricsReader, points, thin
from ossia.train.panel import PanelCallback, sparkline
from ossia.train.rate import flops_again, flops_per_token, peak_flops


def write(path: Path, rows: list[dict], mode: str = "w") -> None:
    with path.open(mode) as file:
        file.write("".join(json.dumps({"time": 100.0 + row["step"], **row}) + "\n" for row in rows))


# curves


@given(st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan)), min_size=1, max_size=400), st.integers(2, 60))
def test_thinned_curves_keep_extremes_ends_and_gaps(values, most):
    y = np.array(values)
    kept = thin(y, most)
    assert list(kept) == sorted(set(kept))
    assert len(kept) <= max(most, len(y) if len(y) <= most else 0) * 1.5 + 5
    assert {0, len(y) - 1} <= set(kept)
    if not np.isnan(y).all():
        assert np.nanmin(y[kept]) == np.nanmin(y)
        assert np.nanmax(y[kept]) == np.nanmax(y)
    assert np.isnan(y).any() == np.isnan(y[kept]).any()


def test_a_spike_and_a_nan_among_100_000_points_stay():
    y = np.ones(100_000)
    y[54_321], y[70_001] = 9.0, math.nan
    kept = thin(y, 800)
    assert {54_321, 70_001} <= set(kept)
    assert len(kept) <= 805


def test_the_reader_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    reader = MetricsReader(path)
    assert not reader.update()
    write(path, [{"step": 1, "loss": 3.0}, {"step": 2, "loss": None, "eval_loss": 4}])
    with path.open("a") as file:
        file.write('{"step": 3, "time": 1, "lo')
    assert reader.update()
    assert not reader.update()
    assert reader.step == 2
    assert points(reader.series["loss"], 10) == {"x": [1, 2], "y": [3, None]}
    assert points(reader.series["eval_loss"], 10, zero=100.0) == {"x": [2], "y": [4]}
    with path.open("a") as file:
        file.write('ss": 2.5}\nnot json\n[1]\n')
    assert reader.update()
    assert reader.series["loss"].last == 2.5
    write(path, [{"step": 1, "loss": 7.0}])
    assert reader.update(), "a shorter file is another one"
    assert list(reader.series["loss"].values) == [7.0]
    write(tmp_path / "other", [{"step": n, "loss": 8.0} for n in range(9)])
    (tmp_path / "other").replace(path)
    assert reader.update()
    assert list(reader.series["loss"].values) == [8.0] * 9, "a longer one in its place is another one too"


def test_a_resumed_run_has_one_value_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [{"step": n, "loss": float(n)} for n in (1, 2, 3, 4, 3, 4, 5)])
    reader = MetricsReader(path)
    reader.update()
    assert list(reader.series["loss"].steps) == [1, 2, 3, 4, 5]


def test_a_part_of_a_curve(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [{"step": n, "loss": float(n)} for n in range(1, 1001)])
    reader = MetricsReader(path)
    reader.update()
    assert points(reader.series["loss"], 50, window=(500, 509))["x"] == list(range(499, 511))


# the report


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's folder with everything that a report shows."""
    folder = tmp_path / "run"
    folder.mkdir()
    SftConfig(model="base", dataset=["<rows>.jsonl"], learning_rate=0.5).save(folder / "config.yaml")
    rows = [{"step": n, "loss": None if n == 7 else 2 / n, "grad_norm": 1.0, "progress": n / 20} for n in range(1, 21)]
    write(folder / "metrics.jsonl", rows)
    sample = {"prompt": "a </script><script>alert(1)</script>", "label": "L", "reasoning": "", "finished": True}
    samples = [
        {**sample, "step": 0, "base": True, "answer": "old"},
        {**sample, "step": 9, "base": False, "answer": "new"},
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    load = {"step": 20, "layers": [0, 1], "load": [[1.5, 0.5], [1, 1]], "base": [[1, 1], [1, 1]]}
    (folder / "experts.json").write_text(json.dumps(load))
    return folder


def test_a_report_needs_nothing_else_and_runs_only_its_own_script(run):
    page = write_report(run).read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=|url\(|@import|https?://(?!www\.w3\.org)", page)
    (code,) = re.findall(r"<script>(.*)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "alert(1)</script>" not in page
    assert "&lt;rows&gt;.jsonl" in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert data["charts"][0]["curves"][0]["y"][6] is None
    assert data["experts"]["load"] == [[1.5, 0.5], [1, 1]]
    assert "not a number at some steps: loss." in page
    for word in ("old", "new", "learning_rate"):
        assert f">{word}<" in page
    assert not list(run.glob(".*.part"))


def test_a_folder_with_metrics_alone_has_a_report_too(tmp_path):
    write(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 1.0}])
    assert "no metrics yet" not in write_report(tmp_path).read_text()
    (tmp_path / "metrics.jsonl").unlink()
    assert "no metrics yet" in write_report(tmp_path).read_text()


def test_time_left_is_told_from_where_a_run_went_on(tmp_path):
    """Half of it was done before; a fifth of the steps took 10 s."""
    note(tmp_path, started=200.0, status="running")
    write(tmp_path / "metrics.jsonl", [{"step": 50, "progress": 0.5}, {"step": 110, "progress": 0.7}])
    assert ">0m15s<" in write_report(tmp_path).read_text()


def test_it_is_written_at_the_start_now_and_then_and_at_the_end(tmp_path):
    lines, report = JsonlTracker(), ReportTracker(interval=1000)
    info = RunInfo(run_dir=tmp_path, project="p", name="first run", tags=("t1",), data={})
    lines.start(info)
    report.start(info)

    def log(step: int) -> str:
        lines.log({"loss": 1.0 * step}, step)
        report.log({"loss": 1.0 * step}, step)
        return (tmp_path / "report.html").read_text()

    assert "first run" in log(1)
    assert "step 1 " not in log(2), "within the interval nothing is written"
    report.interval = report._next = 0.0
    page = log(3)
    assert "step 3 " in page
    assert ">running<" in page
    report.finish("interrupted")
    page = (tmp_path / "report.html").read_text()
    assert ">interrupted<" in page
    assert ">t1<" in page


# the panel


def test_sparkline():
    assert sparkline([1, 2, None, 8]) == "▁▂ █"
    assert sparkline([3, 3]) == "▁▁"
    assert len(sparkline([float(n) for n in range(100)], 10)) == 10


def test_the_panel_shows_the_run():
    from rich.console import Console

    console = Console(file=io.StringIO(), width=90, force_terminal=False)
    panel = PanelCallback(console)
    state = SimpleNamespace(global_step=0, max_steps=40)
    panel.on_train_begin(None, state, None)
    for step in (1, 2, 3):
        state.global_step = step
        logs = {"loss": math.nan if step == 2 else 2 / step, "learning_rate": 1e-4, "tokens_per_second": 12345.6}
        panel.on_log(None, state, None, logs=logs | {"memory_gb": 16.5, "peak_rate_share": 0.41})
    panel.on_log(None, state, None, logs={"eval_loss": 0.9})
    panel.sample = ("what?", "an \x1b[31manswer")
    panel.tell("stopping")
    console.print(panel.render(state))
    panel.close()
    panel.close()
    text = console.file.getvalue()
    for word in (
        "0.6667",
        "█ ▁",
        "held-out 0.9",
        "1.00e-04",
        "12,346 tokens/s",
        "41%",
        "16.5 GB",
        "3 of 40",
        "left",
        "stopping",
    ):
        assert word in text, word
    assert "an ?[31manswer" in text


# the rate


def test_work_of_a_token_is_that_of_the_true_size():
    model = SIZES["20b"]
    # 7.2 GFLOP forward, as much backward, 1.3 of attention at 4,096 tokens.
    assert flops_per_token(model, 4096) == pytest.approx(15.7e9, rel=0.01)
    # All layers again: 6.1 forward without the head, 0.4 of attention.
    assert flops_again(model, 4096, ["layer"] * 24) == pytest.approx(6.5e9, rel=0.01)
    assert flops_again(model, 4096, ["none"] * 24) == 0
    assert flops_per_token({"model_type": "llama"}, 10) is None
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("a card of tomorrow") is None
