"""Rows as other tools write them: each name of a thing is read, and what is not read is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ossia.config.parts import DataOptions, RowOptions
from ossia.data.formats import NOTES, likely, names, read_row
from ossia.data.formats.calls import check_arguments
from ossia.data.readers import BadRow
from ossia.data.render import Counts, Renderer, read_rows
from ossia.errors import UsageError
from ossia.model.tokenizer import load_tokenizer
from ossia.template import load_template

ROOT = Path(__file__).parents[2]
ASK = {"role": "user", "content": "q"}
LAMP = {
    "type": "function",
    "function": {
        "name": "lamp",
        "parameters": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]},
    },
}


def call(name="lamp", arguments='{"on": true}', **more):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def read(row):
    return read_row(row, "f:1")


def said(row):
    """(role, content, thinking, calls, name) of each message."""
    return [
        (m.role, m.content, m.thinking, [(c.name, c.arguments) for c in m.tool_calls], m.name)
        for m in read(row).conversation.messages
    ]


def answered(**fields):
    """The last message of a row whose assistant says "a" beside these fields."""
    found = read({"messages": [ASK, {"role": "assistant", "content": "a", **fields}]})
    assert not found.unused
    return found.conversation.messages[-1]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, "why") for key in names.REASONING if key != "reasoning_details"),
        ("reasoning_details", [{"type": "reasoning.text", "text": "why", "signature": None, "index": 0}]),
        ("reasoning_details", [{"type": "reasoning.summary", "summary": "why"}]),
        ("reasoning", [{"type": "summary_text", "text": "why"}]),
        ("reasoning", {"type": "text", "text": "why"}),
    ],
)
def test_reasoning_by_each_of_its_names(key, value):
    assert answered(**{key: value}).thinking == "why"
    assert answered(**{"thinking": "", key: value}).thinking == "why"
    assert answered(**{key: value, "reasoning_content": "why "}).thinking.strip() == "why", "the same twice"
    with pytest.raises(BadRow, match=r"f:1: messages\[1\].*mean the same and differ"):
        answered(**{key: value, "thinking" if key != "thinking" else "reasoning": "else"})


@pytest.mark.parametrize("key", names.REASONING_COLUMNS)
@pytest.mark.parametrize(
    "row", [{"question": "q", "answer": "a"}, {"instruction": "q", "output": "a"}, {"prompt": "q", "completion": "a"}]
)
def test_reasoning_in_a_column_of_its_own(row, key):
    assert said({**row, key: "why"}) == [("user", "q", None, [], None), ("assistant", "a", "why", [], None)]
    assert read({**row, key: "why"}).unused == []
    renamed = read_row({**row, "steps": "why"}, "f:1", {"steps": key})
    assert renamed.conversation.messages[-1].thinking == "why"


def test_reasoning_without_an_answer_is_named():
    with pytest.raises(BadRow, match="f:1: reasoning, but no answer"):
        read({"question": "q", "answer": "", "cot": "why"})


@pytest.mark.parametrize("key", names.LOSS)
@pytest.mark.parametrize(
    ("value", "weight"), [(0, 0.0), (False, 0.0), (0.0, 0.0), (1, 1.0), (True, 1.0), (0.3, 0.3), (None, None)]
)
def test_loss_by_each_of_its_names(key, value, weight):
    assert answered(**{key: value}).loss == weight
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", key: value}]}
    assert read(row).conversation.messages[-1].loss == weight
    if value is not None:
        with pytest.raises(BadRow, match=r"mean the same and differ|takes|is needed"):
            answered(**{key: value, "weight" if key != "weight" else "train": 0.7})


@pytest.mark.parametrize("weight", [-1, 1e6, "0", [0]])
def test_a_loss_that_is_no_weight_is_named(weight):
    with pytest.raises(BadRow, match=r"messages\[1\]\.weight is .*a weight of at least 0"):
        answered(weight=weight)


CALL = [("lamp", '{"on": true}')]
CALLING = ("assistant", "", None, CALL, None)
RESULT = ("tool", "ok", None, [], "lamp")


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({"role": "assistant", "tool_calls": [call()]}, CALLING),
        ({"role": "assistant", "content": None, "tool_calls": json.dumps([call()])}, CALLING),
        ({"role": "assistant", "content": "", "tool_calls": [json.dumps(call())]}, CALLING),
        ({"role": "assistant", "tool_calls": call()}, CALLING),
        ({"role": "assistant", "tool_calls": [{"name": "lamp", "args": {"on": True}, "id": "c", "type": "tool_call"}]}, CALLING),
        ({"role": "assistant", "tool_calls": [{"function": "lamp", "arguments": {"on": True}}]}, CALLING),
        ({"role": "assistant", "function_call": {"name": "lamp", "arguments": '{"on": true}'}}, CALLING),
        ({"role": "assistant", "content": None, "function_call": json.dumps({"name": "lamp", "arguments": '{"on": true}'})}, CALLING),
        ({"role": "assistant", "tool_calls": [call()], "function_call": {"name": "lamp", "arguments": '{"on": true}'}}, CALLING),
        ({"role": "tool_call", "content": '{"name": "lamp", "arguments": {"on": true}}'}, CALLING),
        ({"role": "tool_call", "content": {"name": "lamp", "parameters": {"on": True}}}, CALLING),
        ({"role": "function_call", "content": '[{"name": "lamp", "arguments": "{\\"on\\": true}"}]'}, CALLING),
        ({"from": "function_call", "value": '{"name": "functions.lamp", "arguments": {"on": true}}'}, CALLING),
        ({"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "lamp", "input": {"on": True}}]}, CALLING),
        ({"role": "assistant", "content": [{"type": "tool_call", "value": '{"name": "lamp", "arguments": {"on": true}}'}]}, CALLING),
        ({"type": "function_call", "call_id": "c", "name": "lamp", "arguments": '{"on": true}', "id": "fc"}, CALLING),
        ({"role": "assistant", "channel": "commentary", "recipient": "functions.lamp", "content_type": "json", "content": '{"on": true}'}, CALLING),
        ({"role": "assistant", "content": "Look.", "function_call": {"name": "lamp", "arguments": {"on": True}}}, ("assistant", "Look.", None, CALL, None)),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "result",
    [
        {"role": "tool", "content": "ok"},
        {"role": "tool", "content": [{"type": "text", "text": "ok"}], "name": "lamp"},
        {"role": "function", "name": "lamp", "content": "ok"},
        {"role": "tool_response", "content": "ok"},
        {"role": "observation", "content": "ok"},
        {"from": "observation", "value": "ok"},
        {"role": "ipython", "content": "ok"},
        {"type": "function_call_output", "call_id": "c", "output": "ok"},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "ok"}]}]},
    ],
)  # fmt: skip
def test_calls_and_results_by_each_of_their_names(turn, result, expected):
    found = read({"messages": [ASK, turn, result, {"role": "assistant", "content": "a"}], "tools": [LAMP]})
    messages = [(m.role, m.content, m.thinking, [(c.name, c.arguments) for c in m.tool_calls], m.name) for m in found.conversation.messages]  # fmt: skip
    assert messages == [("user", "q", None, [], None), expected, RESULT, ("assistant", "a", None, [], None)]
    assert (found.unused, found.notes) == ([], set())


def test_a_turn_of_reasoning_call_and_result_in_three_messages():
    thought = {"role": "assistant", "content": "<think>\nI need it.\n</think>"}
    first = {"role": "tool_call", "content": '{"name": "lamp", "arguments": {"on": true}}'}
    second = {"role": "tool_call", "content": '{"name": "fan", "arguments": {}}'}
    row = {
        "messages": [
            ASK,
            thought,
            first,
            second,
            {"role": "tool_response", "content": "1"},
            {"role": "tool_response", "content": "2"},
        ]
    }
    assert said(row)[1:] == [
        ("assistant", thought["content"], None, [*CALL, ("fan", "{}")], None),
        ("tool", "1", None, [], "lamp"),
        ("tool", "2", None, [], "fan"),
    ]


def test_results_find_their_calls_by_id_in_any_order():
    calls = [call("a", "{}", id="1"), call("b", "{}", id="2"), call("a", "{}", id="3")]
    results = [{"role": "tool", "tool_call_id": id, "content": id} for id in "231"]
    assert [m[4] for m in said({"messages": [ASK, {"role": "assistant", "tool_calls": calls}, *results]})[2:]] == ["b", "a", "a"]  # fmt: skip
    mixed = [{"role": "tool", "tool_call_id": "2", "content": ""}, {"role": "tool", "content": ""}]
    assert [m[4] for m in said({"messages": [ASK, {"role": "assistant", "tool_calls": calls}, *mixed]})[2:]] == [
        "b",
        "a",
    ]


def test_parts_in_their_order():
    parts = [
        {"type": "reasoning", "value": "one"},
        {"type": "text", "value": "I look."},
        {"type": "thinking", "thinking": "two", "signature": "x"},
        {"type": "tool_call", "value": '{"name": "lamp", "arguments": {"on": true}}'},
    ]
    found = read({"messages": [ASK, {"role": "assistant", "content": parts, "loss_weight": 0.5}], "tools": [LAMP]})
    first, second = found.conversation.messages[1:]
    assert (first.thinking, first.content, first.channel, first.loss) == ("one", "I look.", "commentary", 0.5)
    assert (second.thinking, second.content, second.tool_calls[0].name, second.loss) == ("two", "", "lamp", 0.5)
    assert (found.unused, found.notes) == ([], set())


def test_a_text_before_calls_is_a_preamble():
    row = {"messages": [ASK, {"role": "assistant", "content": "I look."}, {"role": "assistant", "thinking": "hm", "tool_calls": [call()]}, ASK, {"role": "assistant", "content": "a"}]}  # fmt: skip
    assert [m.channel for m in read(row).conversation.messages] == [None, "commentary", None, None, None]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"text": "Hi."}], "Hi."),
        ([{"type": "input_text", "text": "Hi."}], "Hi."),
        ([{"type": "text", "value": "H"}, {"type": "text", "value": "i."}], "Hi."),
        ({"type": "text", "text": "Hi."}, "Hi."),
        (["Hi", "."], "Hi."),
        ([{"type": "text", "text": "Hi.", "image_url": None, "annotations": []}], "Hi."),
    ],
)
def test_content_in_parts(content, text):
    found = read({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": content}]})
    assert [m.content for m in found.conversation.messages] == [text, text]
    assert found.unused == []


@pytest.mark.parametrize(
    ("part", "what"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "'image_url'"),
        ({"type": "input_audio"}, "'input_audio'"),
        ({"type": ["text"]}, "'dict'"),
        ({"text": None}, "'dict'"),
        (3, "'int'"),
    ],
)
def test_other_parts_are_refused(part, what):
    with pytest.raises(BadRow, match=rf"messages\[0\]\.content\[1\] is {what}; gpt-oss takes text parts only"):
        read({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]})


def test_images_are_said():
    row = {"messages": [ASK, {"role": "assistant", "content": "a"}], "images": ["a.png"]}
    assert read(row).notes == {"media"}
    row["messages"] = [{"role": "user", "content": "<image>What?"}, row["messages"][1]]
    with pytest.raises(BadRow, match="f:1: images, and <image> in a text"):
        read(row)
    assert not read({**row, "images": []}).notes


@pytest.mark.parametrize(
    ("result", "text"),
    [({"state": "on"}, '{"state": "on"}'), ([{"a": 1}], '[{"a": 1}]'), (3, "3"), (True, "true"), (None, ""), ("", "")],
)
def test_a_tool_may_say_any_value(result, text):
    turns = [ASK, {"role": "assistant", "tool_calls": [call()]}, {"role": "tool", "content": result, "name": "lamp"}]
    if result is None:
        with pytest.raises(BadRow, match="no content"):
            read({"messages": turns})
    else:
        assert said({"messages": turns})[2][1] == text


@pytest.mark.parametrize(
    "tools",
    [
        [LAMP],
        json.dumps([LAMP]),
        [json.dumps(LAMP)],
        LAMP,
        [LAMP["function"]],
        [{**LAMP["function"], "input_schema": LAMP["function"]["parameters"], "parameters": None}],
        [{"type": "function", "function": json.dumps(LAMP["function"])}],
        [{"type": "function", "function": {**LAMP["function"], "parameters": json.dumps(LAMP["function"]["parameters"])}}],
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", names.TOOLS)
def test_tools_by_each_of_their_forms(tools, key):
    found = read({"messages": [ASK, {"role": "assistant", "tool_calls": [call()]}], key: tools})
    assert found.conversation.tools == [LAMP]
    assert (found.unused, found.notes) == ([], set())


@pytest.mark.parametrize(
    ("fields", "declared"),
    [
        ({"tools": [{"type": "python"}, LAMP]}, [{"type": "python"}, LAMP]),
        ({"builtin_tools": ["python", "browser"]}, [{"type": "python"}, {"type": "browser"}]),
        ({"builtin_tools": "python, browser"}, [{"type": "python"}, {"type": "browser"}]),
        ({"builtin_tools": '["browser"]', "tools": [LAMP]}, [LAMP, {"type": "browser"}]),
        ({"tools": ["python"]}, [{"type": "python"}]),
    ],
)
def test_built_in_tools_are_declared(fields, declared):
    assert read({"messages": [ASK, {"role": "assistant", "content": "a"}], **fields}).conversation.tools == declared


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (call("python", "print(1)"), ("python", "print(1)", True)),
        (call("python", '{"code": "print(1)"}'), ("python", "print(1)", True)),
        ({"type": "python", "code": "print(1)"}, ("python", "print(1)", True)),
        (call("browser.search", '{"query": "x"}'), ("browser.search", '{"query": "x"}', True)),
        (call("lamp"), ("lamp", '{"on": true}', False)),
    ],
)
def test_calls_of_built_in_tools(asked, expected):
    tools = [{"type": "python"}, {"type": "browser"}, LAMP]
    turns = [ASK, {"role": "assistant", "tool_calls": [asked]}, {"role": "tool", "content": "1"}]
    found = read({"messages": turns, "tools": tools})
    (made,) = found.conversation.messages[1].tool_calls
    assert (made.name, made.arguments, made.builtin) == expected
    assert (found.conversation.messages[2].name, found.conversation.messages[2].builtin) == (expected[0], expected[2])
    assert not found.notes


def test_a_function_named_python_is_a_function():
    python = {"type": "function", "function": {"name": "python"}}
    row = {"messages": [ASK, {"role": "assistant", "tool_calls": [call("python", "{}")]}], "tools": [python]}
    assert not read(row).conversation.messages[1].tool_calls[0].builtin


@pytest.mark.parametrize("kind", ["web_search", "code_interpreter", "mcp"])
def test_other_built_in_tools_are_refused(kind):
    with pytest.raises(BadRow, match=rf"tools\[0\]\.type is '{kind}'; it takes function, browser or python"):
        read({"messages": [ASK, {"role": "assistant", "content": "a"}], "tools": [{"type": kind}]})


@pytest.mark.parametrize(
    ("arguments", "text", "notes"),
    [
        ('{"on": true}', '{"on": true}', set()),
        ({"on": True}, '{"on": true}', set()),
        ('{"on":true}', '{"on":true}', set()),
        (json.dumps('{"on": true}'), '{"on": true}', {"double_arguments"}),
        (json.dumps(json.dumps('{"on": true}')), '{"on": true}', {"double_arguments"}),
        ("", "{}", {"empty_arguments", "schema"}),
        ("  ", "{}", {"empty_arguments", "schema"}),
        ('{"on": true', '{"on": true', {"bad_arguments"}),
        ("[1]", "[1]", {"bad_arguments"}),
        ('"on"', '"on"', {"bad_arguments"}),
        ('{"on": NaN}', '{"on": NaN}', {"bad_arguments"}),
        ('{"on": 1}', '{"on": 1}', {"schema"}),
        ({"off": True}, '{"off": true}', {"schema"}),
        ({"on": True, "dim": None}, '{"on": true}', {"null_arguments"}),
        ('{"on": true, "dim": null}', '{"on": true, "dim": null}', set()),
    ],
)
def test_arguments_are_held_against_json_and_schema(arguments, text, notes):
    found = read({"messages": [ASK, {"role": "assistant", "tool_calls": [call(arguments=arguments)]}], "tools": [LAMP]})
    assert found.conversation.messages[1].tool_calls[0].arguments == text
    assert found.notes | check_arguments(found.conversation) == notes


@pytest.mark.parametrize(
    ("schema", "note"),
    [({"type": "object", "properties": {"on": {"type": "bool"}}}, "bad_schema"), ({"$ref": "https://x.example/s"}, "bad_schema"), ({"on": {"type": "boolean"}}, "odd_parameters")],
)  # fmt: skip
def test_schemas_that_are_none_are_noted(schema, note):
    tool = {"name": "lamp", "parameters": schema}
    found = read({"messages": [ASK, {"role": "assistant", "tool_calls": [call()]}], "tools": [tool]})
    assert note in found.notes | check_arguments(found.conversation)


def test_undeclared_functions_are_noted():
    turns = [ASK, {"role": "assistant", "tool_calls": [call("heater")]}]
    assert read({"messages": turns, "tools": [LAMP]}).notes == {"undeclared"}
    assert read({"messages": turns}).notes == {"no_tools"}
    assert read({"messages": [ASK, {"role": "function", "name": "lamp", "content": "1"}]}).notes == {"orphan_result"}


def test_nulls_in_objects_are_absence():
    padded = {
        "messages": [
            {"role": "user", "content": "q", "tool_calls": None, "function_call": {"name": None, "arguments": None}},
            {"role": "assistant", "content": None, "refusal": None, "tool_calls": [{"id": "c", "type": "function", "function": {"name": "lamp", "arguments": {"on": True, "dish": None, "deep": {"x": None}}}}]},
            {"role": "tool", "content": "ok", "tool_call_id": "c", "tool_calls": None},
        ],
        "tools": [{"type": "function", "function": {"name": "lamp", "description": None, "strict": None, "parameters": {"type": "object", "properties": {"on": {"type": "boolean", "enum": None}, "dish": None}, "required": ["on"]}}}],
    }  # fmt: skip
    found = read(padded)
    assert found.conversation.tools == [LAMP]
    assert found.conversation.messages[1].tool_calls[0].arguments == '{"on": true}'
    assert (found.unused, found.notes) == ([], {"null_arguments"})
    columns = {"messages": {"role": ["user", "assistant"], "content": ["q", "a"], "name": [None, None]}}
    assert said(columns) == [("user", "q", None, [], None), ("assistant", "a", None, [], None)]


UNUSED = [
    ({"messages": [ASK, {"role": "assistant", "content": "a", "reasonning": "x"}]}, "messages[].reasonning", "reasoning"),
    ({"messages": [ASK, {"role": "assistant", "content": "a", "weigth": 0}]}, "messages[].weigth", "weight"),
    ({"messages": [{**ASK, "content": [{"type": "text", "text": "q", "cache": 1}]}, {"role": "assistant", "content": "a"}]}, "messages[].content[].cache", ""),
    ({"messages": [ASK, {"role": "assistant", "tool_calls": [{**call(), "argumnets": 1}]}], "tools": [LAMP]}, "messages[].tool_calls[].argumnets", "arguments"),
    ({"messages": [ASK, {"role": "assistant", "tool_calls": [{"function": {"name": "lamp", "arguments": {}, "why": 1}}]}], "tools": [LAMP]}, "messages[].tool_calls[].function.why", ""),
    ({"messages": [ASK, {"role": "assistant", "content": "a"}], "tools": [{**LAMP, "returns": {"a": 1}}]}, "tools[].returns", ""),
    ({"messages": [ASK, {"role": "assistant", "content": "a"}], "tools": [{"function": {"name": "f", "paramters": {"a": 1}}}]}, "tools[].function.paramters", "parameters"),
    ({"conversations": [{"from": "human", "value": "q", "mood": 1}, {"from": "gpt", "value": "a"}]}, "conversations[].mood", ""),
    ({"instruction": "q", "output": "a", "sytem": "s"}, "sytem", "system"),
    ({"question": "q", "answer": "a", "thinkng": "s"}, "thinkng", "thinking"),
    ({"chosen": [ASK, {"role": "assistant", "content": "a", "score": 3}], "rejected": [ASK, {"role": "assistant", "content": "b"}]}, "chosen[].score", ""),
    ({"text": "t", "meta": {"a": 1}}, "meta", ""),
]  # fmt: skip


@pytest.mark.parametrize(("row", "path", "near"), UNUSED)
def test_keys_that_nobody_reads_are_named_with_the_nearest(row, path, near):
    assert read(row).unused == [path]
    assert likely(path) == (f"did you mean '{near}'?" if near else likely(path))
    if near:
        assert likely(path)


def test_they_are_counted_by_rows_and_said_once(tmp_path, tiny_gpt_oss, capsys):
    rows = [UNUSED[0][0], UNUSED[0][0], UNUSED[1][0]]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    counts = Counts()
    for outcome in read_rows([str(path)], RowOptions(columns={"gone": "system"}), 0):
        counts.add(outcome)
    assert counts.remarks(RowOptions(columns={"gone": "system"})) == [
        "keys not used: messages[].reasonning (2; did you mean 'reasoning'?), messages[].weigth (1; did you mean 'weight'?)",
        "--columns: no row has 'gone'",
    ]


def test_columns_take_names_that_formats_know_only():
    template = load_template
    with pytest.raises(
        UsageError, match="--columns reads 'x' as 'anwser', which no format knows; did you mean 'answer'"
    ):
        Renderer(template, DataOptions(columns={"x": "anwser"}))
    with pytest.raises(UsageError, match="which no format knows"):
        list(read_rows(["a.jsonl"], RowOptions(columns={"x": "gibberish"}), 0))
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "note": "x"}
    found = read_row(row, "f:1", {"chosen": "output", "rejected": "unused", "note": "unused"})
    assert (found.format, found.unused) == ("query/response", [])
    RowOptions(columns={"a": "unused", "b": "unused"}).validate_rows()


@pytest.mark.parametrize(
    ("answer", "noted"),
    [
        ("<think>\nhm\n</think>\n\n12", False),
        ("hm\n</think>\n\n12", False),
        ("12", False),
        ("<think>\nhm. But wait", True),
        ("<thinking>hm</thinking>12", True),
        ("<think>a</think>12<think>b</think>13", True),
        ("12 <think>hm</think>", True),
        ("a</think>b</think>c", True),
        ("<think><think>a</think>b", True),
    ],
)
def test_think_tags_that_are_not_read_are_noted(answer, noted):
    for row in ({"messages": [ASK, {"role": "assistant", "content": answer}]}, {"question": "q", "answer": answer}):
        assert read(row).notes == ({"think_tags"} if noted else set())
    assert read({"question": "q", "answer": answer, "cot": "x"}).notes == (
        {"think_tags"} if "think" in answer else set()
    )


@pytest.mark.parametrize(
    "text", ['<tool_call>\n{"name": "f"}\n</tool_call>', '<functioncall> {"name": "f"}', '<function_call name="f">']
)
def test_calls_written_as_text_are_noted(text):
    assert read({"question": "q", "answer": text}).notes == {"call_tags"}
    assert read({"question": text, "answer": "a"}).notes == set()


@pytest.mark.parametrize(
    "text", ["12<|im_end|>", "[INST] q [/INST] a", "<|endoftext|>", "<start_of_turn>user", "a</s>"]
)
def test_control_tokens_of_other_formats_are_noted(text):
    assert read({"text": text}).notes == {"control_text"}
    assert read({"question": "q", "answer": text}).notes == {"control_text"}
    assert read({"question": text, "answer": "a"}).notes == set(), "a user may write what they like"


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"problem": "q", "answer": "2", "solution": "It is 2."}, r"answer and solution mean the same and differ; keep one \(--columns '{\"solution\": \"unused\"}'"),
        ({"instruction": "q", "output": "a", "response": "b"}, "output and response"),
        ({"question": "q", "answer": "a", "response": "b"}, "response and answer"),
        ({"prompt": "p", "input": "i", "output": "o"}, "prompt and input"),
        ({"instruction": "q", "input": "i", "context": "c", "output": "a"}, "input and context"),
        ({"messages": [ASK, {"role": "assistant", "content": "a"}], "tools": [LAMP], "functions": [{"name": "f"}]}, "tools and functions"),
        ({"prompt": [ASK, {"role": "assistant", "content": "Sure, "}], "completion": "here"}, "prompt ends with an answer"),
        ({"query": ["q", "r"], "response": ["a", "b"]}, "query is a list, but not of messages"),
        ({"question": "q", "answer": ["4"]}, "answer is a list, but not of messages"),
        ({"messages": None}, "messages is null"),
        ({"messages": [{"content": "q"}]}, r"messages\[0\]: no role"),
        ({"version": "1", "data": [{"question": "q"}]}, "a list of objects under 'data'"),
        ({"messages": [ASK], "tools": "get_weather, get_time"}, r"tools\[0\] is 'get_weather'; it takes an object"),
        ({"messages": [ASK], "builtin_tools": ["calculator"]}, r"builtin_tools\[0\] is 'calculator'; it takes .* browser or python"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_refused_with_the_fix(row, what):
    with pytest.raises(BadRow, match=what):
        read(row)


@pytest.mark.parametrize(
    ("answer", "note"),
    [
        ('[{"name": "lamp", "arguments": {"on": true}}]', "call_tags"),
        ('{"name": "lamp", "arguments": {"on": true}}', "call_tags"),
        ("analysisUser greets. We answer.assistantfinalHello!", "flat_harmony"),
        ("<|begin_of_thought|>hm<|end_of_thought|><|begin_of_solution|>a<|end_of_solution|>", "think_tags"),
        ("<think></think>a", "empty_reasoning"),
        ("NaN", "nothing"),
        ("None", "nothing"),
        ("Analysis of the assistant's final answer.", None),
        ('{"name": "fan", "arguments": {}}', None),
        ('{"lamp": 1}', None),
        ("Nancy", None),
    ],
)
def test_answers_that_hold_something_else_are_noted(answer, note):
    found = read({"question": "q", "answer": answer, "tools": [LAMP]})
    assert found.notes == ({note} if note else set())


def test_reasoning_and_arguments_are_looked_at_too():
    assert answered(thinking="<think>why</think>").thinking == "why"
    assert read({"question": "q", "answer": "a", "cot": "a <think>b"}).notes == {"think_tags"}
    assert read({"question": "q", "answer": "a", "cot": "a <|im_end|>"}).notes == {"control_text"}
    turns = [ASK, {"role": "assistant", "tool_calls": [call(arguments='{"on": "<|call|>"}')]}]
    assert read({"messages": turns, "tools": [LAMP]}).notes == {"control_text"}


@pytest.mark.parametrize(
    ("results", "notes"),
    [
        ([{"tool_call_id": "1"}, {"tool_call_id": "2"}], set()),
        ([{"tool_call_id": "2"}, {"tool_call_id": "1"}], set()),
        ([{}, {}], set()),
        ([{"tool_call_id": "1"}, {"tool_call_id": "X"}], {"orphan_result"}),
        ([{"tool_call_id": "1"}, {"tool_call_id": "1"}], {"orphan_result", "unanswered"}),
        ([{"tool_call_id": "1", "name": "fan"}, {"tool_call_id": "2"}], {"orphan_result"}),
        ([{"tool_call_id": "1"}], {"unanswered"}),
        ([], {"unanswered"}),
    ],
)
@pytest.mark.parametrize("after", [ASK, {"role": "assistant", "content": "a"}])
def test_results_and_calls_that_do_not_meet_are_noted(results, notes, after):
    fan = {"type": "function", "function": {"name": "fan"}}
    turns = [ASK, {"role": "assistant", "tool_calls": [call(id="1"), call("fan", "{}", id="2")]}]
    turns += [{"role": "tool", "content": "r", **result} for result in results]
    found = read({"messages": [*turns, after], "tools": [LAMP, fan]})
    assert found.notes == notes
    assert read({"messages": turns[:2], "tools": [LAMP, fan]}).notes == set(), "the row ends with its calls"


def test_more_arguments_of_python_are_named():
    tools = [{"type": "python"}]
    found = read({"messages": [ASK, {"role": "assistant", "tool_calls": [call("python", {"code": "print(1)", "timeout": 5})]}], "tools": tools})  # fmt: skip
    assert found.conversation.messages[1].tool_calls[0].arguments == "print(1)"
    assert found.unused == ["messages[].tool_calls[].arguments.timeout"]
    odd = read(
        {"messages": [ASK, {"role": "assistant", "tool_calls": [call("python", {"script": "x"})]}], "tools": tools}
    )
    assert odd.notes == {"bad_arguments"}


def test_what_ordinary_rows_have_is_not_noted():
    row = {
        "messages": [ASK, {"role": "assistant", "content": "a", "refusal": "", "logprobs": []}],
        "images": [],
        "audios": {},
    }
    assert (read(row).unused, read(row).notes) == ([], set())
    item = {"type": "message", "role": "assistant", "status": "completed", "content": [{"type": "output_text", "text": "a", "annotations": [], "logprobs": []}]}  # fmt: skip
    assert read({"messages": [ASK, item]}).unused == []
    assert read({"messages": [ASK, {**item, "status": "incomplete"}]}).unused == ["messages[].status"]
    failed = {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": "c", "content": "x", "is_error": True}],
    }
    turns = [
        ASK,
        {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "lamp", "input": {}}]},
        failed,
    ]
    assert read({"messages": turns, "tools": [LAMP]}).unused == ["messages[].content[].is_error"]


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("text", "read in rows of another format"),
        ("response", "read in rows of another format"),
        ("images", ""),
        ("choices", ""),
        ("messages[].stop_reason", ""),
        ("messages[].train_detail", ""),
        ("messages[].tool_call_id", "read elsewhere"),
        ("sytem", "did you mean 'system'?"),
    ],
)
def test_hints_are_near_or_none(path, hint):
    assert likely(path) == hint


def test_the_first_named_are_those_that_may_be_meant(tmp_path):
    rows = [
        {
            "messages": [ASK, {"role": "assistant", "content": "a", "reasonning": "x"}],
            **{f"meta{i}": 1 for i in range(9)},
        }
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    counts = Counts()
    for outcome in read_rows([str(path)], RowOptions(), 0):
        counts.add(outcome)
    assert counts.unused_names().startswith("messages[].reasonning (1; did you mean 'reasoning'?), meta")
    assert counts.unused_names().endswith(" and 2 more (ossia data check --format json)")


def test_texts_of_messages_and_instructions_in_their_other_forms():
    asked = [("user", "q", None, [], None), ("assistant", "a", None, [], None)]
    row = {"prompt": json.dumps([ASK]), "completion": json.dumps([{"role": "assistant", "content": "a"}])}
    assert said(row) == asked
    system = ("system", "Be brief.", None, [], None)
    answer = {"messages": [ASK, {"role": "assistant", "content": "a"}]}
    assert said({**answer, "system": [{"type": "text", "text": "Be brief."}]}) == [system, *asked]
    assert said({**answer, "instructions": "Be brief."}) == [system, *asked]
    assert read({**answer, "system": "Reasoning: high"}).notes == {"effort_text"}
    assert read({"messages": [{**ASK, "name": "Bob"}, answer["messages"][1]]}).notes == {"names"}
    thought = {"from": "function_call", "value": '<think>hm</think>\n{"name": "lamp", "arguments": {"on": true}}'}
    (made,) = read({"conversations": [{"from": "human", "value": "q"}, thought]}).conversation.messages[1:]
    assert (made.thinking, made.tool_calls[0].name) == ("hm", "lamp")


@pytest.mark.parametrize("label", [False, 0, 0.0, "false", "0.0", True, 1.0])
@pytest.mark.parametrize("key", ["messages", "conversation", "conversations"])
def test_labels_as_tables_write_them(label, key):
    row = {key: [ASK, {"role": "assistant", "content": "a"}], "label": label}
    found = read(row)
    assert (found.format, found.conversation.label) == ("kto", str(label).lower() in ("true", "1.0"))


def test_labels_of_something_else_beside_a_verdict():
    row = {"messages": [ASK, {"role": "assistant", "content": "a"}], "label": "math", "kto_tag": True}
    assert read(row).conversation.label is True
    assert read({**row, "kto_tag": None}).format == "messages"
    pair = {"conversation": [{"from": "human", "value": "q"}], "chosen": "a", "rejected": "b"}
    assert read(pair).format == "preference"


def test_nothing_beside_a_call_or_a_harmony_prompt_is_lost():
    made = answered(content="{}", recipient="functions.lamp", channel="commentary", thinking="T")
    assert (made.thinking, made.content, made.tool_calls[0].name) == ("T", "", "lamp")
    prompt = WHOLE[: WHOLE.index("<|channel|>analysis")]
    with pytest.raises(BadRow, match="history beside it has no place"):
        read({"prompt": prompt, "completion": HARMONY, "history": [["a", "b"]]})
    assert read({"prompt": prompt, "completion": HARMONY, "history": []}).unused == []
    both = {"user": "q", "analysis": "w", "final": "a", "system": "s"}
    assert said(both)[0] == ("system", "s", None, [], None)
    assert read(both).unused == []


def test_two_columns_cannot_have_one_name():
    with pytest.raises(UsageError, match="--columns reads two columns as 'query'"):
        Renderer(load_template, DataOptions(columns={"a": "query", "b": "query"}))


HARMONY = "<|channel|>analysis<|message|>7 and 5 make 12.<|end|><|start|>assistant<|channel|>final<|message|>12"
WHOLE = f"<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n\nReasoning: high\n\n# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|><|start|>user<|message|>7+5?<|end|><|start|>assistant{HARMONY}<|return|>"  # fmt: skip


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "7+5?"}, {"role": "assistant", "content": HARMONY}], "reasoning_effort": "high"},
        {"messages": [{"role": "user", "content": "7+5?"}, {"role": "assistant", "content": HARMONY + "<|return|>"}], "reasoning_effort": "high"},
        {"conversations": [{"from": "human", "value": "7+5?"}, {"from": "gpt", "value": f"<|start|>assistant{HARMONY}"}], "reasoning_effort": "high"},
        {"question": "7+5?", "answer": HARMONY, "reasoning_effort": "high"},
        {"instruction": "7+5?", "output": HARMONY, "reasoning_effort": "high"},
        {"text": WHOLE},
        {"prompt": WHOLE[: WHOLE.index("<|channel|>analysis")], "completion": WHOLE[WHOLE.index("<|channel|>analysis") :]},
    ],
)  # fmt: skip
def test_rendered_harmony_is_read_back(row, tiny_gpt_oss):
    found = read(row)
    assert said(row) == [("user", "7+5?", None, [], None), ("assistant", "12", "7 and 5 make 12.", [], None)]
    assert found.notes == set()
    tokenizer = load_tokenizer(tiny_gpt_oss)
    assert load_template(tokenizer).render(found.conversation).input_ids == tokenizer.encode(
        WHOLE, add_special_tokens=False
    )


def test_harmony_in_a_question_stays_text():
    row = {"messages": [{"role": "user", "content": HARMONY}, {"role": "assistant", "content": "a"}]}
    assert said(row)[0] == ("user", HARMONY, None, [], None)


def test_broken_harmony_in_an_answer_is_refused():
    with pytest.raises(BadRow, match=r"f:1: messages\[1\]\.content is harmony that cannot be read"):
        read({"messages": [ASK, {"role": "assistant", "content": "<|channel|>thoughts<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>12"}]})  # fmt: skip


def test_the_prompt_of_a_conversation_carries_no_loss():
    prompt = [ASK, {"role": "assistant", "content": "first"}, ASK]
    found = read({"prompt": prompt, "completion": [{"role": "assistant", "content": "second"}]})
    assert [m.loss for m in found.conversation.messages] == [None, 0.0, None, None]


def test_the_docs_have_the_table():
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert f"<!-- names -->\n{names.table()}\n<!-- /names -->" in page
    for what in NOTES.values():
        assert what in page
