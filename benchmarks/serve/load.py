"""Many clients at once on one `ossia serve`: answers lost or mixed up, seconds, memory.

python -m benchmarks.serve.load [--model FOLDER] [--clients 64] [--requests 2000] [--out FILE.json]

FOLDER defaults to the demo's base model. Every prompt is asked alone first, greedily; under load each answer must be
the same, token for token; the prompts are such that (nearly) no two have one answer, which `distinct_answers` counts.
Every other request is streamed, one in fifty hangs up in the middle (and is asked again).
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from tests.served import Server, serving

from ossia.bench.run import measured_on
from ossia.demo.base import ensure_base

WORDS = [
    "river", "candle", "engine", "market", "window", "garden", "silver", "thunder", "paper", "volcano",
    "guitar", "penguin", "bicycle", "democracy", "yoghurt", "satellite", "chess", "tomato", "bridge", "whale",
    "winter", "lantern", "carpet", "doctor", "opera", "compass", "desert", "honey", "castle", "pirate",
    "algebra", "umbrella", "magnet", "violin", "glacier", "spider", "coffee", "robot", "island", "mirror",
]  # fmt: skip


def prompts(count: int) -> list[str]:
    """Short questions, all different, to the first 40 of which the demo's base has 40 different answers of 4 tokens."""
    rounds = [f" {n}" if n else "" for n in range(1 + count // len(WORDS))]
    return [f"Write one sentence about {word}{round}." for round in rounds for word in WORDS][:count]


class Client:
    """One connection that is kept open, as clients do."""

    def __init__(self, server: Server) -> None:
        self.connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=600)

    def post(self, body: dict[str, Any]) -> http.client.HTTPResponse:
        """The answer to a chat, unread; RuntimeError unless it is a 200."""
        self.connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = self.connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {answer.read().decode()[:300]}")
        return answer

    def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer as one object."""
        return json.loads(self.post(body).read())

    def chunks(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of a streamed answer; RuntimeError where it ends before it is said to."""
        ended = False
        for line in self.post({**body, "stream": True}):
            data = line.strip().removeprefix(b"data: ")
            if data == b"[DONE]":
                ended = True
            elif data:
                chunk = json.loads(data)
                if "error" in chunk:
                    raise RuntimeError(chunk["error"]["message"])
                yield chunk
        if not ended:
            raise RuntimeError("the stream ended without [DONE]")


def text_of(said: dict[str, Any]) -> str:
    """What a message, or a chunk's delta, says."""
    return (said.get("reasoning_content") or "") + (said.get("content") or "")


def load(server: Server, clients: int, requests: int, max_tokens: int, distinct: int) -> dict[str, Any]:
    """Figures of one run; `lost` and `mixed_up` must be 0."""
    process = psutil.Process(server.process.pid)
    bodies = [
        {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": max_tokens}
        for text in prompts(distinct)
    ]
    alone = Client(server)
    expected = [text_of(alone.whole(body)["choices"][0]["message"]) for body in bodies]
    work = iter([(n, random.Random(n).randrange(distinct)) for n in range(requests)])
    lock = threading.Lock()
    seconds: list[float] = []
    first_tokens: list[float] = []
    memory: list[int] = []
    seen: Counter[str] = Counter()
    examples: list[str] = []

    def run() -> None:
        client = Client(server)
        while True:
            with lock:
                job = next(work, None)
            if job is None:
                return
            number, which = job
            try:
                if number % 50 == 7:
                    next(client.chunks(bodies[which]))
                    client.connection.close()
                    seen["hung_up"] += 1
                started = time.monotonic()
                said, first = "", None
                if number % 2:
                    for chunk in client.chunks(bodies[which]):
                        more = text_of(chunk["choices"][0]["delta"])
                        first = first or (time.monotonic() if more else None)
                        said += more
                else:
                    said = text_of(client.whole(bodies[which])["choices"][0]["message"])
            except (OSError, http.client.HTTPException, RuntimeError, ValueError, KeyError) as error:
                with lock:
                    seen["lost"] += 1
                    examples.append(repr(error)[:300])
                client = Client(server)
                continue
            with lock:
                seconds.append(time.monotonic() - started)
                if first is not None:
                    first_tokens.append(first - started)
                seen["answered"] += 1
                if said != expected[which]:
                    seen["mixed_up"] += 1
                    examples.append(f"{bodies[which]}: {said!r}, alone {expected[which]!r}")
                if len(seconds) % max(requests // 20, 1) == 0:
                    memory.append(process.memory_info().rss)

    threads = [threading.Thread(target=run) for _ in range(clients)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = time.monotonic() - started
    server.until("ossia_running", 0)
    return {
        "clients": clients,
        "requests": requests,
        "max_tokens": max_tokens,
        "distinct_prompts": distinct,
        "distinct_answers": len(set(expected)),
        "answered": seen["answered"],
        "hung_up_and_asked_again": seen["hung_up"],
        "lost": seen["lost"],
        "mixed_up": seen["mixed_up"],
        "examples": examples[:5],
        "seconds": round(whole, 1),
        "requests_per_second": round(seen["answered"] / whole, 2),
        "seconds_per_request": _spread(seconds),
        "seconds_to_first_token": _spread(first_tokens),
        "tokens_generated": int(server.metric("ossia_completion_tokens_total")),
        "rss_mb": [round(value / 1e6) for value in memory],
    }


def _spread(values: list[float]) -> dict[str, float]:
    marks = statistics.quantiles(values, n=100)
    return {"median": round(statistics.median(values), 3), "p95": round(marks[94], 3), "max": round(max(values), 3)}


def finish(out: Path | None, device: torch.device, found: dict[str, Any]) -> None:
    """Print what was found, and write it with where it was measured."""
    text = json.dumps({"environment": measured_on(device), **found}, indent=1)
    print(text, flush=True)
    if out:
        out.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--max_tokens", type=int, default=4)
    parser.add_argument("--distinct", type=int, default=40)
    parser.add_argument("--max_batch_size", type=int, default=16)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = args.model or ensure_base()
    flags = ("--max_batch_size", args.max_batch_size, "--max_queue", args.clients)
    with serving("-m", "ossia", "serve", "--model", model, "--port", 0, *flags) as server:
        figures = load(server, args.clients, args.requests, args.max_tokens, args.distinct)
    finish(args.out, torch.device("cpu"), {"model": Path(model).name, **figures})


if __name__ == "__main__":
    main()
