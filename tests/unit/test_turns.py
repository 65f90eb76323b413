"""Rows into one sample per turn."""

from __future__ import annotations

from ossia.template.messages import Conversation, Message, ToolCall
from ossia.template.turns import split_turns


def row(*pairs: tuple[str | None, str]) -> Conversation:
    messages = [Message("system", "s")]
    for index, (thinking, answer) in enumerate(pairs):
        messages += [Message("user", f"q{index}"), Message("assistant", answer, thinking)]
    return Conversation(messages, source="f:1")


def test_rows_without_earlier_reasoning_stay_whole():
    for conversation in (row((None, "a")), row(("t", "a")), row((None, "a"), (" ", "b"), ("t", "c"))):
        assert split_turns(conversation) == [conversation]


def test_each_turn_with_reasoning_ends_a_sample_that_trains_it_alone():
    samples = split_turns(row(("t0", "a0"), (None, "a1"), ("t2", "a2")))
    assert [[m.content for m in s.messages] for s in samples] == [
        ["s", "q0", "a0"],
        ["s", "q0", "a0", "q1", "a1"],
        ["s", "q0", "a0", "q1", "a1", "q2", "a2"],
    ]
    assert [[m.loss for m in s.messages if m.role == "assistant"] for s in samples] == [
        [None],
        [0.0, None],
        [0.0, 0.0, None],
    ]
    assert all(s.source == "f:1" for s in samples)


def test_think_blocks_count_as_reasoning():
    assert len(split_turns(row((None, "<think>t</think>a"), (None, "b")))) == 2
    assert len(split_turns(row((None, "t</think>a"), (None, "b")))) == 2
    assert len(split_turns(row((None, "<think></think>a"), (None, "b")))) == 1


def test_calls_of_built_in_tools_go_with_the_reasoning():
    def turns(call):
        messages = [Message("user", "q"), Message("assistant", "", None, (call,)), Message("tool", "r")]
        rest = [Message("assistant", "a"), Message("user", "q"), Message("assistant", "b")]
        return [len(sample.messages) for sample in split_turns(Conversation([*messages, *rest]))]

    assert turns(ToolCall("python", "1", builtin=True)) == [4, 6]
    assert turns(ToolCall("f", "{}")) == [6]


def test_calls_and_results_stay_in_their_turn():
    conversation = Conversation(
        [
            Message("user", "q"),
            Message("assistant", "", "t"),
            Message("tool", "r", name="f"),
            Message("assistant", "a"),
            Message("user", "q2"),
            Message("assistant", "b"),
        ]
    )
    assert [len(sample.messages) for sample in split_turns(conversation)] == [4, 6]


def test_two_user_messages_are_one_turn_and_an_unanswered_one_is_none():
    messages = [Message("user", "a"), Message("user", "b"), Message("assistant", "x", "t"), Message("user", "c")]
    assert [len(s.messages) for s in split_turns(Conversation(messages))] == [3]


def test_every_turn_of_a_row_is_trained_with_its_reasoning_or_the_last_alone(tiny_gpt_oss, tmp_path):
    import json

    from ossia.config.parts import DataOptions
    from ossia.data.prepare import prepare
    from ossia.model.tokenizer import load_tokenizer
    from ossia.template import load_template

    tokenizer = load_tokenizer(tiny_gpt_oss)
    turns = [("q0", "t0", "a0"), ("q1", "t1", "a1")]
    messages = []
    for question, thinking, answer in turns:
        messages += [{"role": "user", "content": question}]
        messages += [{"role": "assistant", "thinking": thinking, "content": answer}]
    (tmp_path / "r.jsonl").write_text(json.dumps({"messages": messages}) + "\n")

    def trained(multi_turn: str) -> list[str]:
        found = prepare([str(tmp_path / "r.jsonl")], load_template(tokenizer), DataOptions(multi_turn=multi_turn))
        return [tokenizer.decode([i for i, w in zip(r.labels, r.loss_weights, strict=True) if w]) for r in found]

    texts = [
        f"<|channel|>analysis<|message|>{thinking}<|end|><|start|>assistant<|channel|>final<|message|>{answer}<|return|>"
        for _, thinking, answer in turns
    ]
    assert trained("split") == texts
    assert trained("whole") == texts[1:]
