"""The server under load, bad bodies, slow and vanishing clients, a kill."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
import types

import pytest
from benchmarks.serve.fuzz import fuzz
from benchmarks.serve.load import load
from tests.served import scripted, serving

from ossia.serve import app


def test_many_clients_lose_nothing_and_mix_up_nothing(tiny_gpt_oss):
    flags = ("--device", "cpu", "--max_batch_size", 8, "--max_queue", 16)
    with serving("-m", "ossia", "serve", "--model", tiny_gpt_oss, "--port", 0, *flags) as server:
        found = load(server, clients=16, requests=100, max_tokens=24, distinct=20)
    assert (found["answered"], found["lost"], found["mixed_up"]) == (100, 0, 0), found["examples"]
    assert found["distinct_answers"] > 10
    assert found["rss_mb"][-1] < found["rss_mb"][0] + 50


def test_bodies_that_nobody_meant(server):
    found = fuzz(server, cases=200)
    assert found["failures"] == []
    assert found["cases"] > 120
    assert {"200", "400"} <= set(found["statuses"])
    assert json.loads(server.get("/health")) == {"status": "ok"}


def connect(server, buffer=None):
    opened = socket.socket()
    if buffer is not None:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    opened.settimeout(20)
    opened.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    return opened


def request(text, **more):
    body = json.dumps({"messages": [{"role": "user", "content": text}], "stream": True, **more}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def test_a_slow_reader_holds_up_nobody(server):
    said = "<|channel|>final<|message|>" + "y" * 1800 + "<|return|>"
    with connect(server, buffer=4096) as slow:
        # 20 alternatives a token make more than the kernel's buffers take.
        slow.sendall(request(f"say {said}", logprobs=True, top_logprobs=20))
        server.until("ossia_queue_depth", 0)
        server.until("ossia_running", 0, seconds=30)
        started = time.monotonic()
        answer = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
        assert json.loads(answer[2])["choices"][0]["message"]["content"] == "tuned: hi"
        assert time.monotonic() - started < 3
        read = b""
        while b"[DONE]" not in read[-100:]:
            more = slow.recv(1 << 16)
            assert more
            read += more
        assert read.count(b'"delta":{"content":"y"}') == 1800


def test_a_client_that_takes_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(app, "SEND_SECONDS", 0.3)
    closed, taken = [], []

    async def events():
        while True:
            yield "data: {}\n\n"

    async def send(message):
        taken.append(message)
        await asyncio.sleep(0.02 if len(taken) < 30 else 60)

    async def receive():
        await asyncio.sleep(60)

    stream = app.EventStream(types.SimpleNamespace(close=lambda: closed.append(True)), events())
    started = time.monotonic()
    asyncio.run(stream({}, receive, send))
    assert (len(taken), closed) == (30, [True])
    assert 0.8 < time.monotonic() - started < 5


def test_half_requests_and_dropped_connections(server):
    whole, said = request("hi"), len(server.lines)
    for cut in (10, whole.index(b"\r\n\r\n"), len(whole) - 5):
        with connect(server) as opened:
            opened.sendall(whole[:cut])
    for _ in range(20):
        with connect(server) as opened:
            opened.sendall(request("slow 2000"))
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    time.sleep(0.5)
    server.until("ossia_running", 0)
    server.until("ossia_queue_depth", 0)
    assert json.loads(server.get("/health")) == {"status": "ok"}
    assert server.lines[said:] == []


def test_killed_in_the_middle_and_started_again_on_its_port(tiny_gpt_oss):
    with scripted(tiny_gpt_oss) as first:
        port = first.url.rsplit(":", 1)[1]
        with connect(first) as opened:
            opened.sendall(request("slow 2000"))
            assert opened.recv(100)
            first.process.send_signal(signal.SIGKILL)
            first.process.wait(10)
            with pytest.raises(OSError, match=r"refused|reset"):
                connect(first).close()
            with scripted(tiny_gpt_oss, "--port", port) as second:
                assert second.url == first.url
                assert json.loads(second.get("/health")) == {"status": "ok"}
