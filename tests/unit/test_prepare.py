"""From files to tokenised rows: processes, cache, length, splits."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from ossia.config.parts import DataOptions
from ossia.data import prepare as module
from ossia.data.near import groups, signature
from ossia.data.prepare import prepare, split
from ossia.errors import OssiaError, UsageError
from ossia.model.tokenizer import load_tokenizer
from ossia.template import LossWeights, load_template
from ossia.template.messages import Conversation, Message


@pytest.fixture(scope="module")
def tokenizer(tiny_gpt_oss):
    return load_tokenizer(tiny_gpt_oss)


@pytest.fixture(scope="module")
def template(tokenizer):
    return load_template(tokenizer)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """`file(rows)`: the name of a file that holds them; the cache is an empty folder."""
    monkeypatch.setenv("OSSIA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def write(rows, name="a.jsonl"):
        Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return name

    return write


def alpaca(count, seed=0):
    rng = random.Random(seed)
    words = ["red", "blau", "猫", "πι", "12", "on the way"]
    return [
        {"instruction": f"{i} {rng.choices(words, k=6)}", "output": " ".join(rng.choices(words, k=9))}
        for i in range(count)
    ]


def lists(rows):
    return [
        (rows.source(i), *(getattr(rows[i], name).tolist() for name in ("input_ids", "labels", "loss_weights")))
        for i in range(len(rows))
    ]


def conversation(*turns, **more):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)], **more}


def test_rows_are_those_that_the_template_renders(file, template):
    rows = prepare([file([conversation("q1", "a1", "q2", "a2")])], template)
    said = [Message("user", "q1"), Message("assistant", "a1"), Message("user", "q2"), Message("assistant", "a2")]
    rendered = template.render(Conversation(said))
    assert lists(rows) == [("a.jsonl:1", rendered.input_ids, rendered.labels, rendered.loss_weights)]
    assert rendered.labels != rendered.input_ids
    assert rows.lengths.tolist() == [len(rendered.input_ids)]
    assert (rows[-1].input_ids.dtype, rows[0].loss_weights.dtype) == (np.int32, np.float32)
    with pytest.raises(IndexError):
        rows[1]


def test_two_processes_give_the_rows_of_one_in_order(file, template, capsys):
    data = alpaca(700)
    data[400] = {"messages": 3}
    name = file(data)
    options = DataOptions(on_bad_row="skip")
    one = prepare([name], template, options, cache=False, processes=1)
    said = capsys.readouterr().out
    assert lists(prepare([name], template, options, cache=False, processes=2)) == lists(one)
    assert capsys.readouterr().out == said
    assert "1 bad row skipped, first: a.jsonl:401: messages is int" in said


def test_the_first_bad_row_stops_whatever_the_processes(file, template, tmp_path):
    data = alpaca(900)
    data[800] = data[300] = {"x": 1}
    for processes in (1, 2):
        with pytest.raises(OssiaError, match=r"a\.jsonl:301: keys 'x'"):
            prepare([file(data)], template, processes=processes)
    assert not list((tmp_path / "cache").rglob("*.arrow*")), "nothing half-written stays"


def test_a_process_that_dies_is_an_error(file, template, monkeypatch):
    monkeypatch.setattr(module._Worker, "__call__", lambda self, records: module.os._exit(9))
    with pytest.raises(OssiaError, match="ended from outside"):
        prepare([file(alpaca(300))], template, cache=False, processes=2)


def test_cache_is_used_while_nothing_changes(file, template, tokenizer, tmp_path, monkeypatch, capsys):
    data = alpaca(5)
    name = file(data)
    first = lists(prepare([name], template))
    calls = []
    real = module._Job.batches
    monkeypatch.setattr(module._Job, "batches", lambda job, counts: calls.append(1) or real(job, counts))

    def made(*args, **kwargs) -> bool:
        """Whether this had to be made anew."""
        calls.clear()
        prepare(*args, **kwargs)
        return bool(calls)

    capsys.readouterr()
    assert lists(prepare([name], template)) == first
    said = capsys.readouterr().out
    assert "tokenised before, taken from" in said
    assert "5 samples from 5 alpaca rows" in said
    assert not calls
    assert not made([name], load_template(tokenizer)), "an equal template is the same"
    assert made([name], template, cache=False)
    assert made([name], template, DataOptions(max_length=999))
    assert made([name], template, DataOptions(on_bad_row="skip"))
    assert made([name], template, DataOptions(columns={"x": "query"}))
    assert not made([name], template, DataOptions(seed=1)), "nothing is drawn"
    assert made([name + "#3"], template)
    assert made([name + "#3"], template, DataOptions(seed=1))
    assert made([name], load_template(tokenizer, loss=LossWeights(base="all")))
    assert made([name], load_template(tokenizer, reasoning_effort="high"))
    assert made([name], load_template(tokenizer, system="s"))
    assert made([name], load_template(tokenizer, current_date="2026-01-01"))
    assert made([name], template, for_split=True)
    assert not made([name], template)
    file([*data[:4], {"instruction": "new", "output": "row"}])
    assert made([name], template), "the file has other rows now"
    file(data)
    assert not made([name], template), "content counts, not time"
    with monkeypatch.context() as patch:
        patch.setattr(module, "_code", lambda: "other code")
        assert made([name], template)
    for entry in (tmp_path / "cache" / "data").iterdir():
        if entry.is_dir():
            module.os.utime(entry, (0, 0))
    file(alpaca(3, seed=9))
    assert made([name], template)
    assert len([entry for entry in (tmp_path / "cache" / "data").iterdir() if entry.is_dir()]) == 1, "old ones go"


def test_a_cache_that_cannot_be_written_is_said(file, template, tmp_path, monkeypatch, capsys):
    (tmp_path / "plain").write_text("")
    monkeypatch.setenv("OSSIA_CACHE", str(tmp_path / "plain"))
    assert len(prepare([file(alpaca(3))], template)) == 3
    assert "cannot be written, so tokenised rows are not kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "word"),
    [({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference"), (conversation("q", "a", label=False), "kto")],
)
def test_choices_between_answers_are_not_trained_as_answers(file, template, row, word):
    with pytest.raises(UsageError, match=rf"a\.jsonl:1: a {word} row; sft trains answers"):
        prepare([file([row])], template, DataOptions(on_bad_row="skip"))


def test_unused_columns_are_said(file, template, capsys):
    prepare([file([{**row, "grade": 7} for row in alpaca(3)])], template)
    assert "data: keys not used: grade (3)" in capsys.readouterr().out


LONG = conversation("q1 " * 20, "a1 " * 20, "q2 " * 20, "a2 " * 20, "q3", "a3 " * 5, system="Be kind.")


@pytest.fixture
def full(template):
    """Tokens of LONG, of it without its first turn, of its last turn alone."""
    turns = [Message("system", "Be kind.")]
    turns += [Message(m["role"], m["content"]) for m in LONG["messages"]]
    return [len(template.render(Conversation([turns[0], *turns[1 + skip :]])).input_ids) for skip in (0, 2, 4)]


def test_long_rows_are_dropped_by_default_and_counted(file, template, full, capsys):
    rows = prepare([file([LONG, *alpaca(2)])], template, DataOptions(max_length=full[0] - 1))
    assert len(rows) == 2
    assert f"1 row dropped, longer than --max_length {full[0] - 1}" in capsys.readouterr().out
    with pytest.raises(OssiaError, match=rf"a\.jsonl:1: {full[0]} tokens, over --max_length"):
        prepare([file([LONG, *alpaca(2)])], template, DataOptions(max_length=full[0] - 1, truncation="error"))


def test_left_drops_the_oldest_turns_and_keeps_instructions(file, template, tokenizer, full, capsys):
    for limit, kept in ((full[0], 0), (full[0] - 1, 1), (full[1], 1), (full[1] - 1, 2), (full[2], 2)):
        rows = prepare([file([LONG])], template, DataOptions(max_length=limit, truncation="left"))
        assert len(rows[0]) == full[kept]
        text = tokenizer.decode(rows[0].input_ids)
        assert "Be kind." in text
        assert text.endswith("a3 " * 5 + "<|return|>")
        assert ("1 row cut to" in capsys.readouterr().out) == bool(kept)
    name = file([LONG, *alpaca(2)])
    with pytest.raises(OssiaError, match="shorter than every row"):
        prepare([name], template, DataOptions(max_length=60, truncation="left"))
    prepare([file([LONG, conversation("q", "a")])], template, DataOptions(max_length=full[2] - 1, truncation="left"))
    assert "1 row dropped, whose last turn alone is longer" in capsys.readouterr().out


def test_right_cuts_and_says_where(file, template, full, capsys):
    rows = prepare([file([LONG])], template, DataOptions(max_length=full[0] - 3, truncation="right"))
    assert len(rows[0]) == full[0] - 3
    assert "1 row cut to --max_length" in (said := capsys.readouterr().out)
    assert "within what is trained: no end token is trained there" in said
    asked = conversation("q", "a", "and a question that nobody answers")
    length = len(prepare([file([asked])], template)[0])
    capsys.readouterr()
    prepare([file([asked])], template, DataOptions(max_length=length - 4, truncation="right"))
    assert "behind the last trained token" in capsys.readouterr().out
    with pytest.raises(OssiaError, match="shorter than every row"):
        prepare([file([LONG])], template, DataOptions(max_length=40, truncation="right"))


def test_long_texts_are_cut_into_pieces_and_nothing_is_lost(file, template, tokenizer, capsys):
    text = "Once upon a time 从前有座山 <|end|> " * 30
    (whole,) = (row.input_ids for row in prepare([file([{"text": text}])], template))
    assert tokenizer.decode(whole) == text + "<|endoftext|>"
    assert whole[-1] == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert tokenizer.convert_tokens_to_ids("<|end|>") not in whole.tolist()
    capsys.readouterr()
    pieces = prepare([file([{"text": text}, {"text": "short"}])], template, DataOptions(max_length=100))
    count = -(-len(whole) // 100)
    assert [len(row) for row in pieces][:-2] == [100] * (count - 1)
    assert np.concatenate([row.input_ids for row in pieces][:count]).tolist() == whole.tolist()
    assert all((row.loss_weights == 1).all() for row in pieces)
    assert f"cut into {count} pieces, nothing dropped" in capsys.readouterr().out


def chat(text):
    return Conversation([Message("user", text), Message("assistant", f"Yes: {text[::-1]}")])


def test_signatures_meet_for_near_duplicates_only():
    base = "How do I cook rice for four people without burning it, in a small pot, on a gas stove?"
    near = [base, base.upper(), base.replace(",", " ,"), base.replace("four", "five")]
    other = [
        "What is the capital of France and how many people live there today, roughly?",
        "写一首关于秋天的短诗。",
        "写一首关于春天的长诗，要押韵，要有三段。",
        "",
    ]
    group = groups(np.stack([signature(chat(text)) for text in near + other]))
    assert len(set(group[:4].tolist())) == 1
    assert len(set(group.tolist())) == 5
    assert groups(np.zeros((0, 8), np.uint64)).tolist() == []


def test_groups_join_through_others():
    keys = np.arange(32, dtype=np.uint64).reshape(4, 8)
    keys[1, 0] = keys[0, 0]
    keys[3, 5] = keys[1, 5]
    assert groups(keys).tolist() == [0, 0, 2, 0]


def test_split_keeps_near_duplicates_and_the_samples_of_a_row_together(file, template):
    rng = random.Random(1)
    words = [f"w{i}" for i in range(5000)]
    rows = []
    for i in range(60):
        text = " ".join(rng.choices(words, k=60))
        rows += (
            [conversation(f"{text} {copy}", "fine") for copy in ("a", "b", "c")]
            if i % 3 == 0
            else [conversation(text, "fine")]
        )
    thoughts = [
        {"role": "assistant", "content": "a", "thinking": "t"}
        if i % 2
        else {"role": "user", "content": " ".join(rng.choices(words, k=60))}
        for i in range(4)
    ]
    rows.append({"messages": thoughts})
    rng.shuffle(rows)
    name = file(rows)
    found = prepare([name], template, for_split=True)
    assert len(found) == len(rows) + 1, "the last row is two samples"
    train, held, several = split(found, 0.2, 42)
    assert several == 21
    assert 0.1 * len(found) < len(held) <= round(0.2 * len(found))
    sources = [{part.source(i) for i in range(len(part))} for part in (train, held)]
    assert not sources[0] & sources[1]

    def topics(part):
        return {
            rows[int(part.source(i).split(":")[1]) - 1]["messages"][0]["content"].rsplit(" ", 1)[0]
            for i in range(len(part))
        }

    assert not topics(train) & topics(held)
    again = split(found, 0.2, 42)
    assert lists(again[1]) == lists(held)
    assert lists(split(found, 0.2, 7)[1]) != lists(held)
    assert len(held.select(np.array([1]))) == 1
    assert lists(held.select(np.array([1]))) == lists(held)[1:2]


def test_what_cannot_be_split_is_said(file, template):
    found = prepare([file([conversation("the same question for all of them", "a")] * 5)], template, for_split=True)
    with pytest.raises(UsageError, match="5 rows in 1 groups of near duplicates cannot be split"):
        split(found, 0.2, 42)
