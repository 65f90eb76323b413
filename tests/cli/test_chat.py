"""`ossia infer` as a conversation: over a pipe, and in a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from tests.stub import StubEngine

from ossia.config import InferConfig
from ossia.infer.chat import ask
from ossia.infer.commands import run_command
from ossia.infer.engine import Sampling
from ossia.infer.session import Session
from ossia.model.tokenizer import load_tokenizer
from ossia.template import load_template


def test_commands_and_questions_over_a_pipe(ossia, tiny_gpt_oss, rows, tmp_path):
    chat = ("infer", "--max_new_tokens", 6, "--temperature", 0, "--device", "cpu", "--markdown", "true")
    lines = 'hi\n/sytem x\n//etc\n"""\ntwo\nlines\n"""\n/save kept.jsonl\n/compare\n/exit\nnever asked\n'
    done = ossia(*chat, "--model", tiny_gpt_oss, stdin=lines)
    assert done.returncode == 1
    assert "did you mean '/system'?" in done.stderr
    assert "there is no adapter" in done.stderr
    assert "2 of the lines failed" in done.stderr
    assert "\x1b" not in done.stdout
    row = json.loads((tmp_path / "kept.jsonl").read_text(encoding="utf-8"))
    assert [m["content"] for m in row["messages"] if m["role"] == "user"] == ["hi", "/etc", "two\nlines"]
    assert not list((tmp_path.parent / "cache").glob("infer_history")), "a pipe leaves no history"

    sft = ("--max_steps", 3, "--learning_rate", 0.1, "--device", "cpu", "--output_dir", "o", "--report_to", "none")
    ossia.ok("sft", "--model", tiny_gpt_oss, "--dataset", "kept.jsonl", *sft)
    adapter = next((tmp_path / "o").glob("v0-*")) / "last"
    base = ossia.ok(*chat, "--model", tiny_gpt_oss, stdin="hi\n").split("\n", 1)[1]
    out = ossia.ok(*chat, "--adapters", adapter, stdin="hi\n/compare\nhi\n").split("\n", 1)[1]
    first, rest = out.split("\nwith the adapter:\n")
    tuned, without = rest.split("\nwithout the adapter:\n")
    assert tuned == first
    assert without.startswith(base)
    assert base != first


def test_calls_stay_in_the_conversation(tiny_gpt_oss, tmp_path):
    template = load_template(load_tokenizer(tiny_gpt_oss), "harmony")
    engine = StubEngine(template)
    thought = "<|channel|>analysis<|message|>dark<|end|><|start|>assistant"
    call = " to=functions.lamp<|channel|>commentary <|constrain|>json<|message|>{}<|call|>"
    said = f"{thought}<|channel|>commentary<|message|>Now.<|end|><|start|>assistant{thought}{call}"
    engine.reply = template.tokenizer(said)["input_ids"]
    console = Console(file=io.StringIO(), width=200)
    session = Session(engine, InferConfig(model=str(tiny_gpt_oss)), console)
    session.ask("Light!")
    assert "lamp({})" in console.file.getvalue()
    run_command(session, f"/save {tmp_path / 'kept.jsonl'}")
    row = json.loads((tmp_path / "kept.jsonl").read_text(encoding="utf-8"))
    made = [{"type": "function", "function": {"name": "lamp", "arguments": "{}"}}]
    assert row["messages"] == [
        {"role": "user", "content": "Light!"},
        {"role": "assistant", "content": "Now.", "thinking": "dark", "channel": "commentary"},
        {"role": "assistant", "content": "", "thinking": "dark", "tool_calls": made},
    ]
    session.ask("And now?")
    assert "to=functions.lamp" in template.tokenizer.decode(engine.asked[-1][0])
    run_command(session, "/undo")
    assert "1 exchanges are left" in console.file.getvalue()
    engine.generate = lambda *_: [engine.reply]
    assert ask(engine, "Light!", Sampling()) == "(dark\n\ndark) Now.\nlamp({})"


class Terminal:
    """The stub's chat in a terminal."""

    def __init__(self, folder, cache, seconds, *flags):
        self.master, slave = pty.openpty()
        self.seen = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.stub", str(folder), str(seconds), *flags],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OSSIA_CACHE": str(cache), "TERM": "xterm-256color"},
        )
        os.close(slave)

    def type(self, text):
        # Between looking for a signal and waiting for a key Python's readline would miss one until the next key.
        time.sleep(0.3)
        os.write(self.master, text.encode())

    def until(self, text, seconds=60):
        """What was printed up to `text`."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.master, 4096).decode(errors="replace")
                except OSError:
                    pytest.fail(f"the chat has ended: {self.seen}")
        before, _, self.seen = self.seen.partition(text)
        return before


@pytest.fixture
def terminal(tiny_gpt_oss, tmp_path):
    started = []

    def start(seconds, *flags):
        started.append(Terminal(tiny_gpt_oss, tmp_path / "cache", seconds, *flags))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()
        os.close(each.master)


def test_ctrl_c_stops_a_reply_then_clears_the_line_and_leaves_at_the_second(terminal):
    chat = terminal(0.1)
    chat.until("> ")
    chat.type("hello\n")
    chat.until("\x1b[2mt\x1b[0m")  # the first letter of "thought", dim
    chat.type("\x03")
    chat.until("(stopped)")
    chat.until("not kept")
    chat.until("> ")
    chat.type("half a line\x03")
    chat.until("Ctrl-C again")
    chat.until("> ")
    chat.type("/undo\n")
    chat.until("nothing was asked yet")
    chat.until("> ")
    chat.type("\x03")
    chat.until("Ctrl-C again")
    chat.until("> ")
    chat.type("\x03")
    assert chat.process.wait(30) == 0


def test_ctrl_c_stops_one_reply_of_a_comparison(terminal):
    chat = terminal(0.1)
    chat.until("> ")
    chat.type("hello\n")
    chat.until("answer")
    chat.until("> ")
    for stopped in ("with the adapter:", "without the adapter:"):
        chat.type("/compare\n")
        chat.until(stopped)
        chat.until("\x1b[2mt\x1b[0m")
        chat.type("\x03")
        chat.until("(stopped)")
        after = chat.until("\n> ")
        # The other side is still answered; the program goes on.
        assert ("without the adapter:" in after and "answer" in after) == (stopped == "with the adapter:")
    chat.type("/undo\n")
    chat.until("taken back; 0 exchanges")
    chat.until("> ")
    chat.type("\x04")
    assert chat.process.wait(30) == 0


@pytest.mark.parametrize("flags", [(), ("--debug",)])
def test_history_is_its_owners_alone_and_none_with_debug(terminal, tmp_path, flags):
    chat = terminal(0.0, *flags)
    chat.until("> ")
    chat.type("hello\n")
    chat.until("answer")
    chat.until("> ")
    chat.type("\x04")
    assert chat.process.wait(30) == 0
    file = tmp_path / "cache" / "infer_history"
    assert file.exists() == (not flags)
    if not flags:
        assert "hello" in file.read_text(encoding="utf-8")
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
