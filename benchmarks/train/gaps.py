"""Measure a step's time beside its kernels: idle gaps of the GPU, and the host's time for a pass.

python benchmarks/train/gaps.py --out FILE.json [--steps N] FLAGS OF ossia sft …

Trains by `ossia sft`'s own code. Of the last steps but one the host's part is timed (from a drained queue to the last
launch), and the step as a whole; the last one is traced by torch.profiler.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

GAP = 50e-6
"""Seconds of idleness that are listed."""


def idle(intervals: list[tuple[float, float]]) -> dict[str, Any]:
    """Busy seconds of kernels given as (start, end), seconds from the first to the last, and the gaps between."""
    busy, gaps, end = 0.0, [], min(start for start, _ in intervals)
    first = end
    for start, stop in sorted(intervals):
        if start - end > GAP:
            gaps.append(start - end)
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return {
        "seconds": round(end - first, 5),
        "busy": round(busy, 5),
        "idle_share": round(1 - busy / (end - first), 4),
        "gaps": len(gaps),
        "gap_seconds": round(sum(gaps), 5),
        "longest_gaps": [round(gap, 5) for gap in sorted(gaps, reverse=True)[:10]],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    args, flags = parser.parse_known_args()
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    from ossia.bench.run import measured_on
    from ossia.config import SftConfig
    from ossia.train import run as sft

    profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.host: list[float] = []
            self.whole: list[float] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            torch.cuda.synchronize()
            if state.global_step == state.max_steps - 1:
                profiler.start()
            self.began = time.perf_counter()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.launched = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            torch.cuda.synchronize()
            if state.global_step == state.max_steps:
                profiler.stop()
                return
            self.host.append(self.launched - self.began)
            self.whole.append(time.perf_counter() - self.began)

    real, clock = sft._trainer, Clock()

    def with_clock(*args: Any, **kwargs: Any) -> Any:
        trainer = real(*args, **kwargs)
        trainer.add_callback(clock)
        return trainer

    sft._trainer = with_clock  # type: ignore[assignment]
    words = [*flags, "--max_steps", str(args.steps), "--save_strategy", "no", "--logging_steps", "1000"]
    sft.run(SftConfig.from_args(words, "sft", ""))
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [(event.time_range.start / 1e6, event.time_range.end / 1e6) for event in events]
    averages = profiler.key_averages()
    host = sorted(averages, key=lambda event: -event.self_cpu_time_total)[:40]
    device = sorted(averages, key=lambda event: -event.self_device_time_total)[:40]
    result = {
        "flags": flags,
        "host_seconds": round(statistics.median(clock.host[2:]), 4),
        "step_seconds": round(statistics.median(clock.whole[2:]), 4),
        "traced": {"kernels": len(kernels), **idle(kernels)},
        "host": [[event.key[:90], event.count, round(event.self_cpu_time_total / 1e3, 2)] for event in host],
        "device": [[event.key[:90], event.count, round(event.self_device_time_total / 1e3, 2)] for event in device],
        "environment": measured_on(torch.device("cuda", 0)),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: result[key] for key in ("host_seconds", "step_seconds", "traced")}))


if __name__ == "__main__":
    main()
