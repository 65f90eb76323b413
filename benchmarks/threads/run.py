"""Measure what waiting threads cost: decoding and training, on the machine as it is and beside busy processes.

The model is a random gpt-oss of the demo base's width, four layers deep.

python -m benchmarks.threads.run [--rounds 5] [--out FILE.json]

OpenMP reads its wait policy when torch loads, so each policy has a process of its own; they take turns, one measuring
while the others sleep, so that what else the machine does meets all alike.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ossia.threads import WAIT_VARIABLES, allowed_cores

POLICIES: dict[str, dict[str, str]] = {
    "library's default": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "short spin": {"GOMP_SPINCOUNT": "2000"},
}
TOKENS = 32
"""Decoded in a measurement."""
LENGTH = 128
"""Tokens of the row of a training step."""


def measuring() -> None:
    """In a process of a policy: measure once for each line that comes; print, as JSON, tokens per second and the
    milliseconds of cores' time that a token took, which waiting that spins adds to."""
    import torch
    from tests import tiny

    from ossia.adapters.inject import add_lora
    from ossia.infer.engine import Engine, Sampling
    from ossia.model.attention import Attention
    from ossia.model.load import load_model
    from ossia.model.tokenizer import load_tokenizer
    from ossia.template import load_template

    with tempfile.TemporaryDirectory() as parent:
        folder = tiny.gpt_oss(Path(parent) / "model", hidden=576, intermediate=384, layers=4)
        base = load_model(folder, device="cpu")
        template = load_template(load_tokenizer(folder), "harmony")
    model = add_lora(base, rank=8)
    for module in model.modules():
        if isinstance(module, Attention):
            module.stack()  # which the engine would do in inference mode, and training could not use it then
    ids = torch.arange(LENGTH)[None]
    row = {"input_ids": ids, "labels": ids, "loss_weights": torch.ones(1, LENGTH)}
    engine = Engine(model, template, max_batch_size=1)
    sampling = Sampling(max_new_tokens=TOKENS, ignore_eos=True)

    def decode() -> None:
        engine.generate([ids[0, :16].tolist()], sampling)

    def train() -> None:
        model.zero_grad()
        model(**row).loss.backward()

    decode(), train()
    print(json.dumps({"threads": torch.get_num_threads()}), flush=True)
    for _ in sys.stdin:
        found = {}
        for name, work, tokens in (("decode", decode, TOKENS), ("train", train, LENGTH)):
            began, used = time.perf_counter(), time.process_time()
            work()
            found[name] = tokens / (time.perf_counter() - began)
            found[f"{name}_core_ms"] = 1e3 * (time.process_time() - used) / tokens
        print(json.dumps(found), flush=True)


@contextlib.contextmanager
def burners(count: int) -> Iterator[None]:
    """So many processes that never wait."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def measure(rounds: int) -> dict[str, Any]:
    """By load, policy and work: median, least and most of the rounds."""
    free = {key: value for key, value in os.environ.items() if key not in (*WAIT_VARIABLES, "OMP_NUM_THREADS")}
    command = [sys.executable, "-m", "benchmarks.threads.run", "--measuring"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = {name: subprocess.Popen(command, env={**free, **policy}, **pipes) for name, policy in POLICIES.items()}

    def line(name: str) -> dict[str, float]:
        while not (text := workers[name].stdout.readline()).startswith("{"):
            if not text:
                raise RuntimeError(f"the process of {name} ended")
        return json.loads(text)

    threads = {name: line(name)["threads"] for name in workers}
    results: dict[str, Any] = {}
    for load, count in (("as it is", 0), ("a busy process more for each core", allowed_cores())):
        found: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
        with burners(count):
            for at in range(rounds):
                for name in [*workers][at % 3 :] + [*workers][: at % 3]:
                    workers[name].stdin.write("\n")
                    workers[name].stdin.flush()
                    found[name].append(line(name))
        print(f"{load}: done", file=sys.stderr, flush=True)
        results[load] = {
            name: {
                work: {
                    "median": round(statistics.median(each[work] for each in rows), 1),
                    "least": round(min(each[work] for each in rows), 1),
                    "most": round(max(each[work] for each in rows), 1),
                }
                for work in rows[0]
            }
            for name, rows in found.items()
        }
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return {"threads": threads, "rounds": rounds, "results": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measuring", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measuring:
        measuring()
        return
    import torch

    from ossia.bench.run import measured_on

    load = os.getloadavg()[0]
    result = {"environment": measured_on(torch.device("cpu")), "load_before": round(load, 2), **measure(options.rounds)}
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
