"""Speed of `ossia serve` as clients see it, and of `ossia infer --val_dataset`.

python -m benchmarks.serve.speed --model FOLDER --out FILE.json [--adapters DIR …]

FOLDER is a checkpoint, such as one from benchmarks/train/checkpoint.py. Requests are greedy, streamed chats, each with
a prompt of its own, and go on to `max_tokens` (`ignore_eos`). Every served model is measured: the adapters, then the
base; rows are answered by the first. Each case runs once before it is measured, since kernels are compiled and graphs
captured then; what that took is in the file as `first`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.serve.load import WORDS, Client, finish, text_of
from tests.served import Server, serving

from ossia.console import say
from ossia.model.load import pick_device
from ossia.model.tokenizer import load_tokenizer

SHORT = (100, 200)
"""Tokens of the prompts of many clients, from and to."""


class Prompts:
    """Texts of so many tokens, no two alike from their first words on."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = load_tokenizer(folder)
        self._draws = random.Random(0)

    def text(self, tokens: int) -> str:
        words = " ".join(self._draws.choices(WORDS, k=tokens))
        return self._tokenizer.decode(self._tokenizer(words)["input_ids"][:tokens])


class Seen:
    """One streamed answer: seconds to its first text and to its end, tokens of prompt and answer."""

    def __init__(self, client: Client, model: str, prompt: str, tokens: int) -> None:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }
        self.began = time.perf_counter()
        self.first = 0.0
        for chunk in client.chunks(body):
            if chunk["usage"]:
                usage = chunk["usage"]
            elif not self.first and text_of(chunk["choices"][0]["delta"]):
                self.first = time.perf_counter() - self.began
        self.seconds = time.perf_counter() - self.began
        self.prompt, self.tokens = usage["prompt_tokens"], usage["completion_tokens"]
        if self.tokens != tokens:
            raise RuntimeError(f"{self.tokens} tokens came, not {tokens}")


def first_token(client: Client, model: str, prompts: Prompts, length: int) -> dict[str, Any]:
    """Milliseconds until the first text of an answer to a long prompt."""

    def run() -> Seen:
        return Seen(client, model, prompts.text(length), 1)

    first, *seen = repeated(run, 7)
    return {"prompt_tokens": seen[0].prompt, **spread([1e3 * each.first for each in seen], 1e3 * first.first)}


def alone(client: Client, model: str, prompts: Prompts, new: int) -> dict[str, Any]:
    """Tokens/s of one stream from its first text on."""

    def rate(seen: Seen) -> float:
        return (seen.tokens - 1) / (seen.seconds - seen.first)

    first, *seen = repeated(lambda: Seen(client, model, prompts.text(SHORT[0]), new), 4)
    return {"new": new, **spread(list(map(rate, seen)), rate(first))}


def together(server: Server, model: str, prompts: Prompts, new: int, clients: int) -> dict[str, Any]:
    """Tokens/s of all streams together, from the first request to the end of the last answer."""
    connections = [Client(server) for _ in range(clients)]
    delays: list[float] = []

    def run() -> float:
        texts = [prompts.text(SHORT[0] + n * (SHORT[1] - SHORT[0]) // clients) for n in range(clients)]
        began = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            seen = list(pool.map(lambda client, text: Seen(client, model, text, new), connections, texts))
        seconds = time.perf_counter() - began
        delays.append(1e3 * statistics.median(each.first for each in seen))
        return sum(each.tokens for each in seen) / seconds

    first, *rates = repeated(run, 4)
    return {
        "clients": clients,
        "new": new,
        **spread(rates, first),
        "median_first_token_milliseconds": round(statistics.median(delays[1:]), 1),
    }


def repeated(run: Callable[[], Any], times: int) -> list[Any]:
    return [run() for _ in range(times)]


def spread(values: list[float], first: float) -> dict[str, float]:
    named = {"median": statistics.median(values), "least": min(values), "most": max(values), "first": first}
    return {name: round(value, 1) for name, value in named.items()}


def rows(model: Path, adapters: list[str], prompts: Prompts, count: int, new: int) -> dict[str, Any]:
    """One whole command that answers the rows of a file: what it says of its rate, and its seconds with loading."""
    with tempfile.TemporaryDirectory() as folder:
        file, result = Path(folder) / "rows.jsonl", Path(folder) / "answers.jsonl"
        lengths = [SHORT[0] + n * (SHORT[1] - SHORT[0]) // count for n in range(count)]
        asked = [{"messages": [{"role": "user", "content": prompts.text(length)}]} for length in lengths]
        file.write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
        command = ["infer", "--model", model, "--val_dataset", file, "--result_path", result, "--temperature", 0]
        command += ["--max_new_tokens", new, *(["--adapters", *adapters] if adapters else [])]
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "ossia", *map(str, command)], capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - began
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        answers = [json.loads(line) for line in result.read_text(encoding="utf-8").splitlines()]
    said = re.search(r"answered in ([\d.]+) s .*, ([\d,]+) tokens/s\)", done.stdout)
    assert said, done.stdout
    return {
        "rows": count,
        "tokens": sum(answer["completion_tokens"] for answer in answers),
        "median": int(said[2].replace(",", "")),
        "answering_seconds": float(said[1]),
        "command_seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapters", nargs="*", default=[], metavar="DIR")
    parser.add_argument("--prompt", type=int, default=4000, help="tokens of the long prompt")
    parser.add_argument("--new", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--new_of_rows", type=int, default=128)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    prompts = Prompts(args.model)
    command = ["-m", "ossia", "serve", "--model", args.model, "--port", 0, "--max_batch_size", args.clients]
    command += ["--adapters", *args.adapters] if args.adapters else []
    results: list[dict[str, Any]] = []

    def keep(model: str, case: str, result: dict[str, Any]) -> None:
        results.append({"model": model, "case": case, **result})
        say(f"{model}: {case} {result}")

    began = time.perf_counter()
    # The threads that the command has by itself.
    with serving(*command, env={"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}) as server:
        keep("all", "start-up, s", {"median": round(time.perf_counter() - began, 1)})
        client = Client(server)
        for model in [each["id"] for each in json.loads(server.get("/v1/models"))["data"]]:
            keep(model, "first token, ms", first_token(client, model, prompts, args.prompt))
            keep(model, "alone, tokens/s", alone(client, model, prompts, args.new))
            keep(model, "together, tokens/s", together(server, model, prompts, args.new, args.clients))
    keep("infer", "rows, tokens/s", rows(args.model, args.adapters[:1], prompts, args.rows, args.new_of_rows))
    finish(args.out, pick_device("auto"), {"folder": args.model.name, "results": results})
    for each in results:
        say(f"{each['model']:<24} {each['case']:<20} {each['median']:>10,}")


if __name__ == "__main__":
    main()
