"""Lines, commands and the display of `ossia infer`, with an engine that says what it is told to."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from tests.stub import StubEngine

from ossia.config import InferConfig
from ossia.data.formats import read_row
from ossia.errors import OssiaError, UsageError
from ossia.infer.chat import Entry, read_entry
from ossia.infer.commands import COMMANDS, run_command
from ossia.infer.display import Display
from ossia.infer.engine import Engine
from ossia.infer.run import load_engine
from ossia.infer.session import Session
from ossia.template import load_template


@pytest.fixture
def session(tiny_gpt_oss):
    from ossia.model.tokenizer import load_tokenizer

    template = load_template(load_tokenizer(tiny_gpt_oss), "harmony")
    console = Console(file=io.StringIO(), highlight=False, soft_wrap=True)
    return Session(StubEngine(template), InferConfig(model="m"), console)


def printed(session):
    return session.console.file.getvalue()


def entries(text):
    lines = iter(text.splitlines())

    def read(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    found = []
    while True:
        try:
            found.append(read_entry(read))
        except EOFError:
            return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hi\nyou", [Entry("hi"), Entry("you")]),
        ("a\\\nb\\\nc", [Entry("a\nb\nc")]),
        ("a\\", [Entry("a")]),
        ('"""\n/a\n\nb\\\n"""\nc', [Entry("/a\n\nb\\"), Entry("c")]),
        ("//etc/hosts", [Entry("/etc/hosts")]),
        (" /undo ", [Entry(" /undo ", True)]),
        ("/system a\\\nb", [Entry("/system a\nb", True)]),
        ("quit", [Entry("/exit", True)]),
    ],
)
def test_lines_become_questions_and_commands(text, expected):
    assert entries(text) == expected


def test_a_block_without_end_is_no_question():
    with pytest.raises(UsageError, match="has no end"):
        entries('"""\nhalf')


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/sytem x", "did you mean '/system'"),
        ("/", "unknown command /"),
        ("/reset now", "/reset takes nothing behind it"),
        ("/effort hihg", "did you mean 'high'"),
        ("/think fald", "did you mean 'fold'"),
        ("/params temprature 1", "did you mean 'temperature'"),
        ("/params temperature", "needs a value"),
        ("/params temperature -1", "--temperature is -1.0; it must be 0 or more"),
        ("/params temperature nan", "--temperature is nan"),
        ("/params top_p x", "--top_p got 'x'; it takes a number"),
        ("/params max_new_tokens 0", "--max_new_tokens is 0"),
        ("/params seed -1", "--seed is -1"),
        ("/undo", "nothing was asked"),
        ("/compare", "nothing was asked"),
        ("/save x.jsonl", "nothing was asked"),
        ("/save", ".jsonl"),
    ],
)
def test_a_wrong_command_changes_nothing(session, line, message):
    before = session.config
    with pytest.raises(UsageError) as error:
        run_command(session, line)
    assert message in str(error.value)
    assert session.config is before
    assert not session.messages


def test_help_names_every_command(session):
    run_command(session, "/help")
    assert all(f"/{name}" in printed(session) for name in COMMANDS)


def test_settings_reach_the_next_reply(session):
    for line in ("/system Be kind.", "/effort high", "/params temperature 0.2", "/params max_new_tokens 9"):
        run_command(session, line)
    session.ask("q")
    prompt, sampling = session.engine.asked[-1]
    text = session.engine.template.tokenizer.decode(prompt)
    assert "Reasoning: high" in text
    assert "# Instructions\n\nBe kind." in text
    assert (sampling.temperature, sampling.max_new_tokens) == (0.2, 9)
    run_command(session, "/reset")
    assert [message.role for message in session.conversation] == ["system"]


def test_the_system_text_can_be_shown_and_taken_away(session, tiny_gpt_oss):
    session.config = InferConfig(model=str(tiny_gpt_oss), system="Be kind.", device="cpu", max_new_tokens=1)
    session.engine = load_engine(session.config, system=False)
    asked, generate = [], session.engine.generate

    def watched(prompts, *rest):
        asked.append(session.engine.template.tokenizer.decode(prompts[0]))
        return generate(prompts, *rest)

    session.engine.generate = watched
    for line in ("/system", "/system -", "/system", "/system Be brief."):
        session.ask("q")
        run_command(session, line)
    session.ask("q")
    told = ["Be kind." if "Be kind." in text else "Be brief." if "Be brief." in text else None for text in asked]
    assert told == ["Be kind.", "Be kind.", None, None, "Be brief."]
    notes = [line for line in printed(session).splitlines() if line.startswith("system: ")]
    assert notes == ["system: Be kind.", "system: (none)", "system: (none)", "system: Be brief."]


def test_undo_takes_back_one_exchange(session):
    session.ask("one")
    session.ask("two")
    run_command(session, "/undo")
    assert [message.content for message in session.messages] == ["one", "answer"]


def test_saved_rows_are_read_as_rows(session, tmp_path):
    file = tmp_path / "kept.jsonl"
    file.write_text('{"messages": []}', encoding="utf-8")
    run_command(session, "/system Be kind.")
    session.ask("q")
    run_command(session, f"/save {file}")
    first, second = file.read_text(encoding="utf-8").splitlines()
    assert first == '{"messages": []}'
    read = read_row(json.loads(second), "here")
    assert read.format == "messages"
    assert not read.unused
    assert read.conversation.messages == session.conversation
    assert read.conversation.messages[-1].thinking == "thought"


@pytest.mark.parametrize("text", ["a poem\n", "[1]\n", "\x00\xff"])
def test_a_file_that_is_no_jsonl_is_left_alone(session, tmp_path, text):
    file = tmp_path / "poem.jsonl"
    file.write_text(text, encoding="utf-8")
    session.ask("q")
    with pytest.raises(OssiaError, match=r"poem\.jsonl"):
        run_command(session, f"/save {file}")
    assert file.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("think", "expected"),
    [("show", r"^thought\nanswer\n$"), ("hide", r"^answer\n$"), ("fold", r"^thought: 7 tokens, \d+\.\d s\nanswer\n$")],
)
@pytest.mark.parametrize("stream", [True, False])
def test_reasoning_is_shown_hidden_or_folded(session, think, expected, stream):
    import re

    session.config.stream = stream
    run_command(session, f"/think {think}")
    start = len(printed(session))
    session.ask("q")
    assert re.match(expected, printed(session)[start:])
    assert session.messages[-1].thinking == "thought"


def test_a_stopped_reply_is_kept_only_if_it_ended(session):
    session.engine.stop_after = 20
    session.ask("q")
    assert not session.messages
    assert "(stopped)" in printed(session)
    session.engine.stop_after = len(session.engine.reply)
    session.ask("q")
    assert [message.content for message in session.messages] == ["q", "answer"]


def test_an_empty_reply_is_not_kept(session):
    session.engine.reply = session.engine.reply[-1:]
    session.ask("q")
    assert not session.messages
    assert "(an empty reply)" in printed(session)


def test_without_an_adapter_there_is_nothing_to_compare(session):
    session.ask("q")
    session.engine.without_adapter = lambda: Engine.without_adapter(session.engine)
    with pytest.raises(UsageError, match="there is no adapter"):
        run_command(session, "/compare")


def test_markdown_streams_and_nothing_is_lost():
    text = "# Title\n\nSome *words* here.\n\n1. one\n2. two\n\n```py\nx = 1\n\ny = 2\n```\n\nlast " + "long " * 400
    console = Console(file=io.StringIO(), force_terminal=True, width=60, height=10, color_system=None)
    with Display(console, "show", markdown=True) as display:
        for start in range(0, len(text), 3):
            display.push([("final", text[start : start + 3])])
    out = console.file.getvalue()
    assert "*words*" not in out.split("last ")[-1]
    last = out[out.rindex("Title") :]
    for word in ("Title", "Some words here.", "1 one", "2 two", "x = 1", "y = 2"):
        assert word in out
    assert last.count("long") >= 400


def test_control_characters_of_a_reply_are_not_obeyed():
    console = Console(file=io.StringIO())
    with Display(console, "show", markdown=False) as display:
        display.push([("final", "a\x1b[31mb\x9bc\r\n\u3000d\u200d")])
    assert console.file.getvalue() == "a\ufffd[31mb\ufffdc\n\u3000d\u200d\n"
