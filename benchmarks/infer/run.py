"""Generation at gpt-oss-20b's size on one GPU: tokens/s at several batch sizes, time to a first token; transformers'
generate beside it in the same run.

python benchmarks/infer/run.py --model FOLDER --out FILE.json [--cases NAME …] [--profile] [--new 48] [--tiny]

FOLDER is a checkpoint from benchmarks/train/checkpoint.py; --tiny takes a toy of it, to check this script on a CPU.
Every request has its own random prompt. A decode case runs all requests of a batch together from the end of their
prompts; its seconds are those of single steps, the first few left out. transformers has no MXFP4 kernels here, so it
expands the experts to bfloat16. A case that fails stays in the table with its reason. With --profile the kernels of a
step are listed.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ossia.adapters.inject import add_lora
from ossia.bench.run import measured_on
from ossia.compat import quiet_libraries
from ossia.infer.engine import Engine, Sampling
from ossia.model.load import load_model, pick_device

CONTEXT, PROMPT = 1024, 4096
BATCHES = (1, 8, 64)
WARM = 4  # steps that compile, capture and settle
CASES = [
    *(f"decode {batch}{adapter}" for batch in BATCHES for adapter in ("", " adapter")),
    "first token",
    "first token adapter",
    "transformers decode 1",
    "transformers decode 64",
    "transformers first token",
]


def prompts(count: int, length: int, vocabulary: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(count)
    return torch.randint(0, vocabulary, (count, length), generator=draw).tolist()


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def summary(seconds: list[float], tokens: int) -> dict[str, Any]:
    """Rates of steps, each of which gave so many tokens."""
    rates = [tokens / second for second in seconds]
    return {
        "tokens_per_second": round(statistics.median(rates), 1),
        "slowest": round(min(rates), 1),
        "fastest": round(max(rates), 1),
        "step_milliseconds": round(1e3 * statistics.median(seconds), 3),
    }


def first_token(run: Callable[[], None]) -> dict[str, Any]:
    """Milliseconds of whole runs; the first, which compiles, apart."""
    seconds = []
    for _ in range(6):
        started = now()
        run()
        seconds.append(now() - started)
    settled = [round(1e3 * second, 1) for second in seconds[1:]]
    return {
        "milliseconds": statistics.median(settled),
        "slowest": max(settled),
        "fastest": min(settled),
        "first_milliseconds": round(1e3 * seconds[0], 1),
    }


def decode(engine: Engine, batch: int, context: int, adapter: str | None, new: int, profile: bool) -> dict[str, Any]:
    sampling = Sampling(max_new_tokens=new)
    requests = [
        engine.submit(prompt, sampling, adapter) for prompt in prompts(batch, context, engine.model.config.vocab_size)
    ]
    started = now()
    while not all(request.tokens for request in requests):
        engine.step()  # prompts, first tokens, and the first steps: captures
    prefill = now() - started
    seconds: list[float] = []
    kernels: list[dict[str, Any]] = []
    while engine.busy:
        if profile and len(seconds) == new // 2:
            kernels = profiled(engine.step)
        started = now()
        came = engine.step()
        if len(came) == batch:
            seconds.append(now() - started)
    result = {"batch": batch, "context": context, "new": new, "prefill_seconds": round(prefill, 2)}
    return result | summary(seconds[WARM:], batch) | ({"kernels": kernels} if kernels else {})


def profiled(run: Callable[[], Any]) -> list[dict[str, Any]]:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    with watch(activities=[ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU]) as seen:
        run()
        now()
    found = [
        {"name": event.key[:90], "calls": event.count, "milliseconds": round(event.self_device_time_total / 1e3, 3)}
        for event in seen.key_averages()
    ]
    return sorted(found, key=lambda kernel: -kernel["milliseconds"])[:24]


def ours(args: argparse.Namespace, cases: list[str], keep: Callable[..., None]) -> None:
    if not cases:
        return
    started = now()
    model: Any = load_model(args.model)
    model = add_lora(model, rank=8).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1e-3)
    print(f"loaded in {now() - started:.1f} s", flush=True)
    for case in cases:
        keep(case, functools.partial(one, args, model, case))


def one(args: argparse.Namespace, model: Any, case: str) -> dict[str, Any]:
    """One of our cases."""
    adapter = "default" if case.endswith(" adapter") else None
    words = case.split()
    batch, context = (int(words[1]), args.context) if words[0] == "decode" else (1, args.prompt)
    template: Any = SimpleNamespace(stop_ids=[])
    engine = Engine(model, template, max_batch_size=batch, max_length=context + args.new)
    if words[0] == "decode":
        return decode(engine, batch, context, adapter, args.new, args.profile)
    ids = prompts(1, context, model.config.vocab_size)[0]

    def run() -> None:
        engine.submit(ids, Sampling(max_new_tokens=1), adapter)
        engine.step()

    return {"prompt": context, **first_token(run)}


def theirs(args: argparse.Namespace, cases: list[str], keep: Callable[..., None]) -> None:
    if not cases:
        return
    from transformers import AutoModelForCausalLM, Mxfp4Config

    started = now()
    device = pick_device("auto")
    model: Any = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True), device_map=str(device)
    )
    model = model.eval()
    print(f"loaded by transformers in {now() - started:.1f} s", flush=True)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def generate(batch: int, length: int, new: int) -> None:
        ids = torch.tensor(prompts(batch, length, model.config.vocab_size), device=device)
        mask = torch.ones_like(ids)
        model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, **options)

    def decode_case(batch: int) -> dict[str, Any]:
        # Whole prompts of a large batch do not fit beside the expanded experts: eager attention is quadratic.
        context = args.context if batch == 1 else min(args.context, 256)
        long, short = (args.new_of_peer, 1)
        generate(batch, context, 2)
        times = []
        for new in (short, long) * 2:
            started = now()
            generate(batch, context, new)
            times.append(now() - started)
        # The prompt's time is that of a run with one token.
        seconds = [(b - a) / (long - short) for a, b in (times[:2], times[2:])]
        return {"batch": batch, "context": context, "new": long, **summary(seconds, batch)}

    for case in cases:
        if case.endswith("first token"):
            keep(case, lambda: {"prompt": args.prompt, **first_token(lambda: generate(1, args.prompt, 1))})
        else:
            keep(case, functools.partial(decode_case, int(case.split()[-1])))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", nargs="*", default=CASES, choices=CASES, metavar="NAME")
    parser.add_argument("--new", type=int, default=48, help="tokens of an answer")
    parser.add_argument("--new-of-peer", type=int, default=16)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="short prompts")
    args = parser.parse_args()
    args.context, args.prompt = (16, 40) if args.tiny else (CONTEXT, PROMPT)
    quiet_libraries()
    results: list[dict[str, Any]] = []
    environment = measured_on(pick_device("auto"))

    def keep(case: str, run: Callable[[], dict[str, Any]]) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            result = run()
        except (RuntimeError, torch.OutOfMemoryError) as error:
            result = {"failed": " ".join(str(error).split())[:600]}
        if torch.cuda.is_available():
            result["peak_bytes"] = torch.cuda.max_memory_allocated()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        results.append({"case": case, **result})
        args.out.write_text(json.dumps({"environment": environment, "results": results}, indent=1), encoding="utf-8")
        for kernel in result.get("kernels", ()):
            print(f"  {kernel['milliseconds']:8.3f} ms  {kernel['calls']:>5} calls  {kernel['name']}")
        print(case, {key: value for key, value in result.items() if key != "kernels"}, flush=True)

    ours(args, [case for case in args.cases if not case.startswith("transformers")], keep)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    theirs(args, [case for case in args.cases if case.startswith("transformers")], keep)


if __name__ == "__main__":
    main()
