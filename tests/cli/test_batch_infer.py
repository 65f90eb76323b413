"""`ossia infer --val_dataset`: rows with counts and log-probabilities, a run killed in the middle, metrics."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from tests.served import ScriptedEngine

from ossia.cli import main
from ossia.config import InferConfig
from ossia.data.formats import read_row
from ossia.infer import metrics
from ossia.infer.batch import Answers, row_message
from ossia.model.tokenizer import load_tokenizer
from ossia.template import load_template
from ossia.template.history import split_answer
from ossia.template.messages import Message, ToolCall

ROWS, NEW = 40, 90


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Rows of different lengths, every second one with an answer of its own."""
    path = tmp_path_factory.mktemp("questions") / "q.jsonl"
    rows = []
    for number in range(ROWS):
        asked = {"role": "user", "content": f"{number}? " + "word " * (number * 7 % 20)}
        rows.append({"messages": [asked, *([{"role": "assistant", "content": f"答 {number}"}] if number % 2 else [])]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_killed_run_goes_on_where_it_was(ossia, tiny_gpt_oss, questions, tmp_path):
    common = ["infer", "--model", tiny_gpt_oss, "--val_dataset", questions, "--temperature", 0, "--device", "cpu",
              "--max_new_tokens", NEW, "--logprobs", "true", "--top_logprobs", 2, "--seed", 1]  # fmt: skip
    said = ossia.ok(*common, "--result_path", "whole.jsonl", "--max_batch_size", 7)
    whole = (ossia.cwd / "whole.jsonl").read_text(encoding="utf-8")
    assert "rows/s" in said
    assert "20 rows with answers of their own: exact match 0.0 %" in said
    check_rows(whole)

    command = [*common, "--result_path", "cut.jsonl", "--max_batch_size", 2]
    part, result = ossia.cwd / "cut.jsonl.part", ossia.cwd / "cut.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "ossia", *map(str, command)], cwd=ossia.cwd, stdout=subprocess.DEVNULL,
        env={**os.environ, "OSSIA_CACHE": str(tmp_path.parent / "cache")},
    )  # fmt: skip
    until = time.monotonic() + 120
    while time.monotonic() < until and (not part.exists() or part.read_bytes().count(b"\n") < 6):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = part.read_bytes().count(b"\n") - 1
    assert 5 <= done < ROWS
    assert not result.exists()
    with part.open("ab") as file:
        file.write(b'{"row": 3, "answ')  # what a kill in the middle of a line leaves

    other = ossia.fails(2, *command, "--seed", 2)
    assert "cut.jsonl.part has answers to other rows" in other
    assert "--resume false" in other
    said = ossia.ok(*command, "--max_batch_size", 5)
    assert f"going on: {done} of {ROWS} rows are answered" in said
    assert f"{ROWS - done} rows answered in" in said
    for one, other in zip(apart(result.read_text(encoding="utf-8")), apart(whole), strict=True):
        assert one[0] == other[0]
        # Sums of another batch size end in other digits.
        assert one[1] == pytest.approx(other[1], abs=1e-4)
    assert not part.exists()


def apart(text):
    """Of each row, all that is the same whatever the batch; and the log-probabilities."""
    for line in text.splitlines():
        row = json.loads(line)
        content = row.pop("logprobs")["content"]
        yield (row, [token["token"] for token in content]), [token["logprob"] for token in content]


def check_rows(text):
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == ROWS
    for number, row in enumerate(rows):
        assert row["messages"][0]["content"].startswith(f"{number}? ")
        assert row["labels"] == (f"答 {number}" if number % 2 else None)
        said = row["messages"][1:]
        assert all(message["role"] == "assistant" for message in said)
        assert "\n\n".join(message["content"] for message in said if message["content"]) == row["response"]
        assert "\n\n".join(message["thinking"] for message in said if "thinking" in message) == (row["reasoning"] or "")
        assert row["tools"] is None
        assert row["finish_reason"] in ("stop", "length")
        assert 0 < row["completion_tokens"] <= NEW
        assert row["prompt_tokens"] > 20
        content = row["logprobs"]["content"]
        assert len(content) == row["completion_tokens"]
        for token in content:
            best = token["top_logprobs"]
            assert len(best) == 2
            # The likeliest was taken.
            assert (token["token"], token["logprob"]) == (best[0]["token"], best[0]["logprob"])
            assert 0 >= best[0]["logprob"] >= best[1]["logprob"]
            assert token["bytes"] is None or bytes(token["bytes"]).decode() == token["token"]
    assert len({row["prompt_tokens"] for row in rows}) > 10


def test_draws_do_not_depend_on_the_batch(ossia, tiny_gpt_oss, questions, tmp_path):
    from ossia.infer.run import run

    written = []
    for size in (1, 9):
        path = tmp_path / f"{size}.jsonl"
        flags = ["--model", tiny_gpt_oss, "--val_dataset", questions, "--result_path", path, "--max_new_tokens", 12,
                 "--device", "cpu", "--max_batch_size", size]  # fmt: skip
        run(InferConfig.from_args([str(flag) for flag in flags], "ossia infer", ""))
        written.append(path.read_text(encoding="utf-8"))
        # A whole result is not gone on with: the next run answers anew.
        assert not path.with_name(f"{size}.jsonl.part").exists()
    assert written[0] == written[1]
    assert all(json.loads(line)["logprobs"] is None for line in written[0].splitlines())


def test_wrong_flags_and_prompts_are_named(ossia, tiny_gpt_oss, tmp_path):
    (ossia.cwd / "long.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "a" * 140_000}]}) + "\n", encoding="utf-8"
    )
    rows = ["infer", "--model", tiny_gpt_oss, "--device", "cpu", "--val_dataset", "long.jsonl", "--result_path"]
    assert "--val_dataset: long.jsonl:1 has 140," in ossia.fails(2, *rows, "a.jsonl")
    assert "--top_logprobs goes with --logprobs true" in ossia.fails(2, *rows, "a.jsonl", "--top_logprobs", 3)
    (ossia.cwd / "folder").mkdir()
    assert "--result_path folder: cannot be written" in ossia.fails(2, *rows, "folder")


def test_bad_rows_stop_it_or_are_left_out(tiny_gpt_oss, tmp_path, capsys):
    rows = [
        {"question": "Are you {{NAME}}?", "answer": "Yes"},
        {"x": 1},
        {"text": "no question"},
        {"messages": [{"role": "assistant", "content": "nobody asked"}]},
        {"messages": [{"role": "user", "content": "half of a character \ud800"}]},
        {"ask": "kept", "answer": "Yes"},
    ]
    file, result = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = ["infer", "--model", str(tiny_gpt_oss), "--device", "cpu", "--max_new_tokens", "2"]
    assert main([*command, "--on_bad_row", "skip"]) == 2
    assert "--on_bad_row goes with --val_dataset" in capsys.readouterr().err
    command += ["--val_dataset", str(file), "--result_path", str(result), "--columns", '{"ask": "question"}']
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "rows.jsonl:2: keys 'x'" in error
    assert "--on_bad_row skip" in error
    assert main([*command, "--on_bad_row", "skip", "--model_name", "Ossia"]) == 0
    assert "--val_dataset: 4 bad rows skipped, first: " in capsys.readouterr().out
    answers = [json.loads(line) for line in result.read_text(encoding="utf-8").splitlines()]
    assert [row["messages"][0]["content"] for row in answers] == ["Are you Ossia?", "kept"]
    assert [row["labels"] for row in answers] == ["Yes", "Yes"]


LAMP = {"type": "function", "function": {"name": "lamp", "parameters": {"type": "object"}}}
THOUGHT = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
CALL = " to=functions.lamp<|channel|>commentary <|constrain|>json<|message|>"


def user(text):
    return {"role": "user", "content": text}


def lamp(arguments, **more):
    call = {"type": "function", "function": {"name": "lamp", "arguments": arguments}}
    return {"role": "assistant", "content": "", **more, "tool_calls": [call]}


def test_calls_are_answers(tiny_gpt_oss, tmp_path, capsys):
    """The engine says what the rows tell it to; the result is read again as rows that train the same calls."""
    told = [
        # What the model is to say, what the row says.
        (f'{CALL}{{"on": true, "at": [1, 2]}}<|call|>', lamp('{"at": [1, 2], "on": true}')),
        (f'{THOUGHT}{CALL}{{"on": 1}}<|call|>', lamp('{"on": true}', thinking="dark")),
        (f'{THOUGHT}<|channel|>commentary<|message|>Now.<|end|><|start|>assistant{THOUGHT}{CALL}{{}}<|call|>', lamp("{}")),
        ("<|channel|>final<|message|>No.<|return|>", lamp("{}")),
        (f"{CALL}{{}}<|call|>", {"role": "assistant", "content": "Yes"}),
        ("<|channel|>final<|message|>Yes<|return|>", {"role": "assistant", "content": "Yes"}),
    ]  # fmt: skip
    rows = [{"messages": [user(f"say {said}"), label], "tools": [LAMP]} for said, label in told]
    rows.append({"messages": [user("Light!"), lamp("{}"), {"role": "tool", "content": "it is on"}], "tools": [LAMP]})
    file, result = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    template = load_template(load_tokenizer(tiny_gpt_oss), "harmony")
    flags = ["--model", str(tiny_gpt_oss), "--val_dataset", str(file), "--result_path", str(result)]
    answers = Answers.of(InferConfig.from_args(flags, "ossia infer", ""), tiny_gpt_oss, template)
    answers.answer(ScriptedEngine(template, 300))
    answers.finish()

    found = [json.loads(line) for line in result.read_text(encoding="utf-8").splitlines()]
    assert [row["response"] for row in found] == [
        'lamp({"on": true, "at": [1, 2]})', 'lamp({"on": 1})', "Now.\nlamp({})", "No.", "lamp({})", "Yes",
        "base: told it is on",
    ]  # fmt: skip
    assert [row["labels"] for row in found] == [
        'lamp({"at": [1, 2], "on": true})', 'lamp({"on": true})', "lamp({})", "lamp({})", "Yes", "Yes", None,
    ]  # fmt: skip
    assert found[1]["messages"][1:] == [lamp('{"on": 1}', thinking="hm")]
    assert found[2]["messages"][1:] == [
        {"role": "assistant", "content": "Now.", "thinking": "hm", "channel": "commentary"},
        lamp("{}", thinking="hm"),
    ]
    assert found[6]["messages"][1:3] == [lamp("{}"), {"role": "tool", "content": "it is on", "name": "lamp"}]
    assert all(row["tools"] == [LAMP] for row in found)
    said = capsys.readouterr().out
    assert "2 rows with answers of their own: exact match 50.0 %" in said
    assert "4 rows whose answer is a call: 3 answered with a call, 2 with the same (name and arguments)" in said
    assert "1 row whose answer is a text answered with a call" in said
    for row in found:
        read = read_row(row, "result").conversation
        assert list(map(row_message, read.messages)) == row["messages"]
        assert read.tools == row["tools"]
        assert any(template.render(read).loss_weights)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ('{"a": 1, "b": [2]}', '{"b":[2],"a":1.0}', True),
        ('{"a": true}', '{"a": 1}', False),
        ('{"a": [1, 2]}', '{"a": [2, 1]}', False),
        ('{"a": 1}', '{"a": 1, "b": null}', False),
        ("print(1)", "print(1)\n", True),
        ("print(1)", "print(2)", False),
        ("{", "{}", False),
    ],
)
def test_calls_that_are_the_same(one, other, same):
    assert metrics.same_call(ToolCall("f", one), ToolCall("functions.f", other)) is same
    assert not metrics.same_call(ToolCall("f", one), ToolCall("g", one))


def test_an_answer_is_as_much_as_is_said_at_once():
    thought, said = Message("assistant", "", "hm"), Message("assistant", "Now.", channel="commentary")
    call, final = Message("assistant", tool_calls=(ToolCall("f", "{}"),)), Message("assistant", "Yes")
    asked, result = Message("user", "?"), Message("tool", "ok", name="f")
    for before, answer in (
        ([asked], [thought, said, thought, call]),
        ([asked, call, result], [said, final]),
        ([asked, final], [final]),
        ([asked, call], [thought, call]),
        ([asked, call, result], []),
        ([], [thought, final]),
    ):
        assert split_answer([*before, *answer]) == (before, answer)


def test_metrics_know_chinese():
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    same = metrics.measure(["今天 天气很好。", "The cat sat."], ["今天 天气很好。", "The cat sat. "])
    assert all(value == pytest.approx(100) for value in same.values())
    words = metrics.Words().tokenize("今天GPT-4 天气好, the Cat's naïve")
    assert words == ["今", "天", "gpt", "4", "天", "气", "好", "the", "cat", "s", "naïve"]
    assert metrics.bleu_tokenizer(["今天天气很好"]) == "zh"
    assert metrics.bleu_tokenizer(["The weather is fine, 好"]) == "13a"
    near = metrics.measure(["今天的天气很好。"], ["今天天气很好。"])
    assert near["exact_match"] == 0
    assert near["rougeL"] == pytest.approx(100 * 2 * (6 / 7) * 1 / (6 / 7 + 1))  # six characters of seven, and of six
    assert 30 < near["bleu"] < 100
    assert near["chrf"] > 50
    apart = metrics.measure(["完全不同"], ["今天天气很好"])
    assert (apart["rouge1"], apart["rougeL"]) == (0, 0)


def test_without_the_libraries_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(metrics, "_NEEDED", {"no_such_module": "no-such-package"})
    line = metrics.metrics_line(["a", "b"], ["a", "c"])
    assert line == (
        "2 rows with answers of their own: exact match 50.0 %; BLEU, chrF and ROUGE need: pip install no-such-package"
    )
