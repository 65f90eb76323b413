"""Harmony texts read back: rendered again, what was read gives the tokens of the text."""

from __future__ import annotations

import json
import random
import re

import pytest
from tests.parity import test_harmony as harmony
from tests.parity.test_harmony import KEEP, dated, everything, oh, oracle, released, template, tokenizer  # noqa: F401

from ossia.errors import OssiaError
from ossia.template.harmony_text import looks_like_harmony, parse_conversation, parse_turn
from ossia.template.harmony_tools import tools_section
from ossia.template.harmony_types import read_tools_section
from ossia.template.messages import Conversation, Message, ToolCall

CONTROL = re.compile(r"<\|\w+\|>(final<\|message\|>)?")


@pytest.fixture(autouse=True)
def _ordinary_words(monkeypatch):
    """Texts without the names of control tokens: in harmony text those are control tokens."""
    monkeypatch.setattr(harmony, "WORDS", [word for word in harmony.WORDS if not CONTROL.fullmatch(word)])


def rendered(template, parsed):  # noqa: F811
    return template.render(Conversation(parsed.messages, parsed.tools, parsed.reasoning_effort)).input_ids


def tried(read, text):
    """What was read, or the words of the refusal."""
    try:
        return read(text)
    except OssiaError as error:
        return str(error)


def ids_of(tokenizer, text):  # noqa: F811
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)


def test_conversations_of_openai_harmony_come_back(template, oracle, tokenizer):  # noqa: F811
    read = refused = builtin = preambles = 0
    for seed in range(700):
        row = harmony.conversation(random.Random(seed))
        if "<|end|>" in json.dumps(row.tools):
            continue
        parts = harmony.without_old_analysis(everything(row, (row.reasoning_effort or "medium").capitalize()), True)
        text = oracle.decode(oracle.render_conversation_for_training(oh.Conversation.from_messages(parts), KEEP))
        assert looks_like_harmony(text)
        parsed = tried(parse_conversation, text)
        if isinstance(parsed, str):
            assert "cannot be read back" in parsed
            refused += 1
            continue
        assert rendered(template, parsed) == ids_of(tokenizer, text), (seed, text)
        assert parsed.dropped == []
        read += 1
        builtin += any(call.builtin for message in parsed.messages for call in message.tool_calls)
        preambles += any(message.channel == "commentary" for message in parsed.messages)
    assert read > 400
    assert refused < read / 20
    assert builtin > 50
    assert preambles > 30


def test_old_reasoning_in_a_text_comes_back_too(template, oracle):  # noqa: F811
    """Nothing that the text holds is lost; what of it is rendered is the template's business."""
    compared = 0
    for seed in range(300):
        row = harmony.conversation(random.Random(seed))
        if row.tools:
            continue
        text = oracle.decode(
            oracle.render_conversation_for_training(oh.Conversation.from_messages(everything(row)), KEEP)
        )
        parsed = parse_conversation(text)
        assert [(m.content, m.thinking or None) for m in parsed.messages] == [
            (m.content, m.thinking) for m in row.messages
        ]
        compared += 1
    assert compared > 60


def test_texts_of_the_released_template_come_back(released, dated, tokenizer):  # noqa: F811
    """Without tools token for token; with them, what its layout differs in is written as openai-harmony has it."""
    same = normalised = 0
    for seed in range(700):
        row = harmony.conversation(random.Random(seed))
        rng = random.Random(seed)
        messages = [m for i, m in enumerate(row.messages) if i == 0 or m.role not in ("system", "developer")]
        messages = [m for m in messages if m.role != "tool" and not m.tool_calls and not m.channel and m.content]
        if not any(m.role == "assistant" for m in messages):
            continue
        plain = [harmony.plain(message) for message in messages]
        if rng.random() < 0.5:
            text = released(plain)
            parsed = parse_conversation(text)
            assert parsed.dropped == ["the date 2026-02-03 (--current_date keeps it)"]
            assert rendered(dated, parsed) == ids_of(tokenizer, text), text
            same += 1
            continue
        arguments = rng.choice([{"a": 1}, '{"a": "é"}'])
        result = rng.choice(["sunny", '{"t": "warm"}', '"quoted"', "7"])
        call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
        call |= {"thinking": "hm"} if rng.random() < 0.5 else {}
        question = [Message("user", "q")]
        turn = [*plain, harmony.plain(question[0]), call, {"role": "tool", "content": result}]
        schema = {"type": "object", "properties": {"a": {"type": "integer", "description": "x", "default": 1}}}
        tools = [{"type": "function", "function": {"name": "f", "description": "Does it.", "parameters": schema}}]
        parsed = parse_conversation(released(turn, tools=tools))
        written = arguments if isinstance(arguments, str) else json.dumps(arguments)
        expected = [
            Message("assistant", "", call.get("thinking"), (ToolCall("f", written),)),
            Message("tool", result, name="f"),
        ]
        assert parsed.messages[-2:] == expected
        again = Conversation([*messages, *question, *expected], tools)
        assert rendered(dated, parsed) == dated.render(again).input_ids
        normalised += 1
    assert same > 250
    assert normalised > 250


def test_tools_come_back_or_are_named():
    read = 0
    for seed in range(1000):
        rng = random.Random(seed)
        tools = [harmony.tool(rng, f"f{i}") for i in range(2)]
        section = tools_section(tools)
        parsed = tried(read_tools_section, section)
        if isinstance(parsed, str):
            # Comments of several lines, and comments in the middle of a type, hide where the type ends.
            assert re.search("the types of tool f[01] cannot be read back", parsed)
            continue
        assert tools_section(parsed) == section, seed
        read += 1
    assert read > 900


def test_types_are_schemas_again():
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Where:\nNote: a city", "default": "Rome"},
            "unit": {"type": "string", "enum": ["c", "f"], "default": "c"},
            "days": {"type": "array", "items": {"type": "number"}, "nullable": True},
            "near": {"oneOf": [{"type": "string", "description": "a name"}, {"type": "number", "default": 3}]},
            "where": {"type": "object", "properties": {"lat": {"type": "number"}}, "required": ["lat"]},
            "maybe": {"type": ["string", "null"]},
            "title": {"title": "A title", "type": "boolean", "examples": ["yes", "no"]},
        },
        "required": ["city", "where"],
    }
    tools = [
        {"type": "function", "function": {"name": "f", "description": "Does it.\nWell.", "parameters": schema}},
        {"type": "function", "function": {"name": "g", "description": ""}},
    ]
    assert read_tools_section(tools_section(tools)) == tools


# --- fragments and single cases

ANALYSIS = "<|channel|>analysis<|message|>7 and 5 make 12.<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>12"
THOUGHT = [Message("assistant", "12", "7 and 5 make 12.")]


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (ANALYSIS + FINAL, THOUGHT),
        (ANALYSIS + FINAL + "<|return|>", THOUGHT),
        (ANALYSIS + FINAL + "<|end|>\n", THOUGHT),
        ("<|start|>assistant" + ANALYSIS + FINAL + "<|return|><|endoftext|>", THOUGHT),
        ("assistant" + ANALYSIS + FINAL, THOUGHT),
        ("<|channel|>final<|message|>12", [Message("assistant", "12")]),
        ("<|channel|>final<|message|><think>x</think>12", [Message("assistant", "<think>x</think>12", "")]),
        (
            ANALYSIS + "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>",
            [Message("assistant", "", "7 and 5 make 12.", (ToolCall("f", "{}"),))],
        ),
        (
            " to=functions.f<|channel|>commentary json<|message|>{}<|call|>",
            [Message("assistant", "", None, (ToolCall("f", "{}"),))],
        ),
        (
            "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant to=functions.f<|channel|>commentary"
            "<|constrain|>json<|message|>{}<|call|><|start|>assistant to=functions.g<|channel|>commentary<|message|>{}",
            [Message("assistant", "I look.", None, (ToolCall("f", "{}"), ToolCall("g", "{}")))],
        ),
        (
            "<|channel|>analysis to=python code<|message|>1+1<|call|><|start|>python to=assistant<|channel|>analysis"
            "<|message|>2<|end|>" + FINAL,
            [
                Message("assistant", "", None, (ToolCall("python", "1+1", builtin=True),)),
                Message("tool", "2", name="python", builtin=True),
                Message("assistant", "12"),
            ],
        ),
        (
            ANALYSIS + "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|><|start|>assistant" + ANALYSIS,
            [
                Message("assistant", "I look.", "7 and 5 make 12.", channel="commentary"),
                Message("assistant", "", "7 and 5 make 12."),
            ],
        ),
    ],
)
def test_fragments_of_an_answer(text, messages):
    assert looks_like_harmony(text)
    assert parse_turn(text) == messages
    assert parse_conversation("<|start|>user<|message|>q<|end|><|start|>assistant" + text.removeprefix(
        "<|start|>").removeprefix("assistant")).messages[1:] == messages  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hello<|end|>" + FINAL, "character 1 .*text outside a message"),
        (ANALYSIS + "hello" + FINAL, r"character \d+ \('hello.*text outside a message"),
        ("<|channel|>odd<|message|>x", "channel 'odd'"),
        ("<|start|>wizard<|message|>x", "role 'wizard'"),
        ("<|channel|>analysis<|message|>x" + FINAL, "before <\\|end\\|> has ended"),
        ("<|channel|>final<|end|>", "no <\\|message\\|>"),
        ("<|start|>assistant to=functions.f to=g<|channel|>commentary<|message|>x", "words that harmony does not know"),
        (
            "<|start|>user<|message|>x<|end|><|start|>system<|message|>x<|end|>",
            "second system block|message of the user",
        ),
    ],
)
def test_broken_texts_are_refused_with_the_place(text, says):
    for read in (parse_conversation, parse_turn):
        with pytest.raises(OssiaError, match=says):
            read(text)


SYSTEM = (
    "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n\nReasoning: high\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message."
)


@pytest.mark.parametrize(
    ("system", "dropped"),
    [
        (SYSTEM, []),
        (SYSTEM.replace("OpenAI", "us"), ["model identity 'You are ChatGPT, a large language model trained by us.'"]),
        (SYSTEM.replace("2024-06", "2025-01"), ["knowledge cutoff 2025-01"]),
        (SYSTEM.replace("-06", "-06\nCurrent date: 2026-02-03"), ["date 2026-02-03"]),
        (SYSTEM.replace("high", "none"), ["Reasoning: none"]),
        (SYSTEM.replace("final.", "final!"), ["words of a system block"]),
        (SYSTEM.split("\n")[0], ["words of a system block"]),
        (SYSTEM.replace("# Valid", "# Tools\n\n## python\n\nRun it.\n\n# Valid"), ["declare the tool python"]),
        ("Be brief.", ["place of instructions"]),
        (None, ["lack of a system block"]),
    ],
)
def test_what_is_not_kept_is_told(system, dropped):
    block = "" if system is None else f"<|start|>system<|message|>{system}<|end|>"
    parsed = parse_conversation(block + "<|start|>user<|message|>q<|end|><|start|>assistant")
    assert len(parsed.dropped) == len(dropped), parsed.dropped
    assert all(words in found for words, found in zip(dropped, parsed.dropped, strict=True))
    assert parsed.messages[-1] == Message("user", "q")
    assert parsed.reasoning_effort == ("high" if system and "high" in system else None)
    assert parsed.messages[0].content == ("Be brief." if system == "Be brief." else "q")
    assert parsed.tools == ([{"type": "python"}] if system and "## python" in system else [])


@pytest.mark.parametrize(
    ("part", "dropped"),
    [
        ("assistant<|message|>x<|end|>", "lack of a channel"),
        ("assistant to=f<|channel|>commentary<|message|>{}<|call|>", "recipient f of a call"),
        ("assistant to=functions.f<|channel|>analysis<|message|>{}<|call|>", "channel analysis of a call"),
        ("assistant to=functions.f<|channel|>commentary xml<|message|>{}<|call|>", "content type 'xml'"),
        ("assistant<|channel|>final<|message|>x<|endoftext|>y<|end|>", "control token <|endoftext|>"),
        ("assistant<|channel|>final<|message|>x<|call|>", "calls nothing"),
        ("user:Ann<|message|>x<|end|>", "name 'Ann'"),
        ("functions.f to=assistant<|channel|>analysis<|message|>x<|end|>", "channel analysis of a result"),
    ],
)
def test_what_a_message_cannot_hold_is_told(part, dropped):
    parsed = parse_conversation(f"<|start|>system<|message|>{SYSTEM}<|end|><|start|>{part}")
    assert len(parsed.dropped) == 1
    assert dropped in parsed.dropped[0]
    if not part.startswith("user"):
        with pytest.raises(OssiaError, match="cannot hold"):
            parse_turn(f"<|start|>{part}")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hello",
        "a <|start|> b",
        "say <|end|> now",
        "<|channel|>",
        "<|message|>",
        "<|start|>\n<|message|>",
        "<|im_start|>user",
    ],
)
def test_ordinary_text_is_no_harmony(text):
    assert not looks_like_harmony(text)
