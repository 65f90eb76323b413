"""Tokens of an answer into reasoning, text and calls, as they come."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ossia.infer.engine import Token
from ossia.model.tokenizer import load_tokenizer
from ossia.serve.answer import Answer, PlainSplitter
from ossia.serve.errors import ApiError
from ossia.serve.grammar import Form, Vocabulary
from ossia.serve.service import check_schema
from ossia.template import load_template
from ossia.template.messages import Message, ToolCall

MARKS = ("<|channel|>", "<|start|>", "<|end|>", "<|message|>", "<|call|>", "<|return|>", "<|constrain|>")
WORDS = (
    "analysis",
    "final",
    "commentary",
    "assistant",
    " to=functions.f",
    " to=f",
    "json",
    "user",
    "x",
    "{}",
    " ",
    "é",
)
TEXTS = st.lists(st.sampled_from((*MARKS, *MARKS, *WORDS))).map("".join)


@pytest.fixture(scope="module")
def template(tiny_gpt_oss):
    return load_template(load_tokenizer(tiny_gpt_oss), "harmony")


def ids_of(template, text):
    return template.tokenizer(text)["input_ids"]


def run(answer, ids):
    deltas = [delta for id in ids for delta in answer.push(Token(id))]
    return deltas + answer.end("stop")


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_any_reply_is_taken_apart_as_template_parse_does(template, text):
    ids = ids_of(template, text)
    ends = [place for place, id in enumerate(ids) if id in template.stop_ids]
    ids = ids[: ends[0] + 1] if ends else ids
    answer, parsed = Answer(template.stream()), template.parse(ids)
    deltas = run(answer, ids)
    assert (answer.content, answer.reasoning) == (parsed.content, parsed.thinking)
    assert [(call.name, call.arguments) for call in answer.calls] == [
        (call.name, call.arguments) for call in parsed.tool_calls
    ]
    for kind, whole in (("content", answer.content), ("reasoning", answer.reasoning)):
        assert "".join(delta.text for delta in deltas if delta.kind == kind) == whole
    for number, call in enumerate(answer.calls):
        parts = [delta for delta in deltas if delta.kind == "call" and delta.call == number]
        assert (parts[0].name, "".join(delta.text for delta in parts)) == (call.name, call.arguments)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("abé😀 ", max_size=30),
    stops=st.lists(st.text("abé😀 ", min_size=1, max_size=4), max_size=3),
)
def test_stop_texts_and_the_tokens_that_go_with_the_text(template, text, stops):
    answer = Answer(PlainSplitter(template), stops, Vocabulary(template, 266))
    deltas = run(answer, ids_of(template, text))
    # The stop text that is complete first ends the answer, as it does where tokens are not kept back.
    shown = next((text[:size] for size in range(len(text) + 1) if any(stop in text[:size] for stop in stops)), None)
    expected = text if shown is None else shown[: min(shown.find(stop) for stop in stops if stop in shown)]
    assert answer.content == "".join(delta.text for delta in deltas) == expected
    assert answer.tokens == [token for delta in deltas for token in delta.tokens]
    assert b"".join(answer.vocabulary.bytes(token.id) for token in answer.tokens).decode() == expected
    assert answer.stopped is (shown is not None)


def test_no_text_of_a_stop_is_shown_before_it_is_known_not_to_be_one(template):
    answer = Answer(PlainSplitter(template), ["abc"])
    shown = ["".join(delta.text for delta in answer.push(Token(id))) for id in ids_of(template, "xababx")]
    assert shown == ["x", "", "", "ab", "", "abx"]


def test_why_an_answer_ended(template):
    call = ids_of(template, "<|channel|>commentary to=functions.f<|message|>{}<|call|>")
    for ids, engine, reason in ((call, "stop", "tool_calls"), (call[:-1], "length", "length"), ([], "stop", "stop")):
        answer = Answer(template.stream())
        for id in ids:
            answer.push(Token(id))
        answer.end(engine)
        assert answer.reason == reason


def follows(words, grammar, text):
    mask, ids = words.follow(grammar), ids_of(words.template, text)
    return all(mask(ids[:place])[id] for place, id in enumerate(ids))


@pytest.mark.parametrize(
    ("form", "right", "wrong"),
    [
        (Form("f", choice=["a b", 'c"d', "é"]), ["a b", 'c"d', "é"], ["a", "a bc", "c"]),
        (Form("f", regex=r"a/b|[/\\]+\d"), ["a/b", "//1", "\\9"], ["a", "/x", "a/bc"]),
        (Form("f", regex="x\ny"), ["x\ny"], ["xy", "x"]),
        (Form("f", schema={"type": "array", "items": {"type": "integer"}}), ["[1]"], ['["a"]']),
    ],
)
def test_forms_of_the_final_text(template, form, right, wrong):
    words = Vocabulary(template, 266)
    grammar = words.grammar(form, [], None)
    for begin in ("", "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"):
        for text in right:
            assert follows(words, grammar, f"{begin}<|channel|>final<|message|>{text}<|return|>"), text
        for text in wrong:
            assert not follows(words, grammar, f"{begin}<|channel|>final<|message|>{text}<|return|>"), text
    assert not follows(words, grammar, "<|channel|>commentary<|message|>")


def test_calls_that_must_or_may_be_made(template):
    words = Vocabulary(template, 266)
    strict = {"name": "f", "strict": True, "parameters": {"type": "object", "additionalProperties": False}}
    tools = [{"type": "python"}, {"type": "browser"}, {"type": "function", "function": strict}]
    made = {
        "f": template.prompt([Message("assistant", tool_calls=(ToolCall("f", "{}"),))]),
        "python": template.prompt([Message("assistant", tool_calls=(ToolCall("python", "1\n+1", True),))], tools=tools),
        "browser": template.prompt([Message("assistant", tool_calls=(ToolCall("browser.find", "{}", True),))], tools=tools),
        "": template.prompt([Message("assistant", "Hi")]),
    }  # fmt: skip
    opener = template.tokenizer("<|start|>assistant")["input_ids"]

    def allowed(grammar, name):
        # As it was written, without what the prompt gives: up to the assistant, and the next one's opening.
        ids = made[name]
        start = next(i for i in range(len(ids)) if ids[i : i + len(opener)] == opener) + len(opener)
        ids = [id if id != template._end else template._return for id in ids[start : -len(opener)]]
        mask = words.follow(grammar)
        return all(mask(ids[:place])[id] for place, id in enumerate(ids))

    for call, names in ((None, set(made)), ("", {"f", "python", "browser"}), ("python", {"python"}), ("f", {"f"})):
        grammar = words.grammar(None, tools, call)
        assert {name for name in made if allowed(grammar, name)} == names


@pytest.mark.parametrize("regex", ["(", "a\\", "x/\nfinal: TEXT\n//"])
def test_a_regular_expression_cannot_leave_its_place_in_the_grammar(template, regex):
    words = Vocabulary(template, 266)
    said = "<|channel|>final<|message|>hello<|return|>"
    with contextlib.suppress(ApiError):
        assert not follows(words, words.grammar(Form("guided_regex", regex=regex), [], None), said)


def test_json_with_another_chat_format(tiny_llama):
    template = load_template(load_tokenizer(tiny_llama))
    words = Vocabulary(template, len(template.tokenizer))
    form = Form("response_format", schema={"type": "object", "properties": {"a": {"type": "integer"}}})
    for text, allowed in (('{"a": 1}<|im_end|>', True), ('{"a": "x"}<|im_end|>', False), ("hi", False)):
        assert follows(words, words.grammar(form, [], None), text) is allowed
    with pytest.raises(ApiError, match="only none and auto"):
        words.grammar(None, [{"function": {"name": "f"}}], "f")


def test_schemas_that_are_too_deep():
    schema = {}
    for _ in range(31):
        schema = {"items": schema}
    check_schema(schema, "tools")
    with pytest.raises(ApiError, match="nested more than 32"):
        check_schema({"items": [schema]}, "tools")
