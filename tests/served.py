"""A server in a process of its own: `ossia serve`, or, run as a program, one whose engine says what it is told."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import types
import urllib.request
from contextlib import contextmanager
from pathlib import Path


class ScriptedEngine:
    """The engine's contract with answers by rule. The last user text decides:

    `say TEXT` is answered with TEXT (harmony written out, special tokens included); `slow N` with N tokens of 20 ms,
    `long N` with N at once; `fail` breaks a step; anything else with the reasoning "thought" and a final text that repeats it.
    """

    max_length = 4096

    def __init__(self, template, size, adapters=(), max_batch_size=4):
        self.template, self.adapters, self.max_batch_size = template, list(adapters), max_batch_size
        self.model = types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=size))
        self.waiting, self.active = [], []

    def submit(self, prompt, sampling, adapter=None, allowed=None):
        from ossia.infer.engine import Request

        request = Request(prompt, sampling, adapter, allowed)
        text = self.template.tokenizer.decode(prompt)
        asked = text.rpartition("<|start|>user<|message|>")[2].removesuffix("<|end|><|start|>assistant")
        if "to=assistant<|channel|>commentary<|message|>" in asked:
            asked = "told " + asked.rpartition("<|message|>")[2]
        said = f"<|channel|>analysis<|message|>thought<|end|><|start|>assistant<|channel|>final<|message|>{adapter or 'base'}: {asked}<|return|>"
        if asked.startswith("say "):
            said = asked[4:]
        elif asked.startswith(("slow ", "long ")):
            said = "<|channel|>final<|message|>" + "x" * int(asked[5:]) + "<|return|>"
        request.slow, request.fails = asked.startswith("slow "), asked == "fail"
        request.left = self.template.tokenizer(said)["input_ids"]
        self.waiting.append(request)
        return request

    def cancel(self, request):
        for requests in (self.waiting, self.active):
            if request in requests:
                requests.remove(request)
                request.finish_reason = "cancelled"

    @property
    def busy(self):
        return bool(self.waiting or self.active)

    def step(self, meanwhile=lambda: None):
        from ossia.infer.engine import Token

        while self.waiting and len(self.active) < self.max_batch_size:
            self.active.append(self.waiting.pop(0))
        if any(request.slow for request in self.active):
            time.sleep(0.02)
        meanwhile()
        if any(request.fails for request in self.active):
            raise RuntimeError("told to fail")
        came = []
        for request in list(self.active):
            id = request.left.pop(0)
            if request.allowed is not None:
                mask = request.allowed(request.ids)
                id = id if mask[id] else int(mask.nonzero()[-1])
            top = request.sampling.top_logprobs
            token = Token(id) if top is None else Token(id, -0.5, tuple((id, -0.5 - n) for n in range(top)))
            request.tokens.append(token)
            came.append((request, token))
            if id in self.template.stop_ids and not request.sampling.ignore_eos:
                request.finish_reason = "stop"
            elif len(request.tokens) >= request.sampling.max_new_tokens or not request.left:
                request.finish_reason = "length"
            if request.finish_reason:
                self.active.remove(request)
        return came


class Server:
    """A running server."""

    def __init__(self, process, url, lines):
        self.process, self.url, self.lines = process, url, lines

    def client(self, key="none"):
        import openai

        return openai.OpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0, timeout=60)

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read().decode()

    def post(self, path, body, headers=()):
        """(status, headers, body) of a POST; `body` may be bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **dict(headers)})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.headers, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read().decode()

    def metric(self, name):
        """The sum of a metric's samples."""
        found = [line.split()[-1] for line in self.get("/metrics").splitlines() if re.match(name + r"[ {]", line)]
        return sum(map(float, found))

    def until(self, name, value, seconds=10):
        """Wait for a metric to have a value."""
        end = time.monotonic() + seconds
        while (seen := self.metric(name)) != value:
            assert time.monotonic() < end, f"{name} is {seen}, not {value}"
            time.sleep(0.05)


@contextmanager
def serving(*command, env=None, cwd=None):
    """Start `python COMMAND` and wait until it is ready; ended at exit whatever it does."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **(env or {})}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=variables,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    ready = threading.Event()

    def read():
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if line.startswith("ready: "):
                ready.set()
        ready.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        assert ready.wait(120)
        found = [line for line in lines if line.startswith("ready: ")]
        assert found, "\n".join(lines)
        yield Server(process, found[0].split()[1].removesuffix("/v1"), lines)
    finally:
        process.kill()
        process.wait()


def scripted(folder, *flags, env=None):
    """`serving` with a `ScriptedEngine` on the tokenizer in `folder`."""
    return serving(__file__, folder, "--port", 0, *flags, env=env)


if __name__ == "__main__":
    from ossia.config import ServeConfig
    from ossia.model.tokenizer import load_tokenizer
    from ossia.serve.run import _key, listen, serve
    from ossia.template import load_template

    folder, *flags = sys.argv[1:]
    config = ServeConfig.from_args(["--model", folder, *flags], "serve", "")
    template = load_template(load_tokenizer(Path(folder)), config.template)
    engine = ScriptedEngine(template, len(template.tokenizer) + 3, ["tuned"], config.max_batch_size)
    with listen(config) as opened:
        serve(engine, {"tuned": template, None: template}, config, "base", opened, _key(config))
