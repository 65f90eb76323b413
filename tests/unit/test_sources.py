"""What `--dataset` words name."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from ossia.data import hub
from ossia.data.readers import decode
from ossia.data.sources import find_datasets, read_datasets
from ossia.errors import OssiaError, UsageError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, start in (("a.jsonl", 0), ("b.jsonl", 100), ("sub/c.jsonl", 200)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f'{{"n": {start + i}}}\n' for i in range(10)))
    return tmp_path


def numbers(*words, seed=42):
    return [decode(record)["n"] for record in read_datasets(find_datasets(list(words)), seed)]


def test_files_folders_and_globs(folder):
    assert numbers("a.jsonl") == list(range(10))
    assert numbers("a.jsonl", "sub") == [*range(10), *range(200, 210)]
    assert numbers(".") == numbers("*.jsonl") == numbers("[ab].jsonl") == [*range(10), *range(100, 110)]
    assert len(numbers("**/*.jsonl")) == 30
    (folder / "odd*2#3.jsonl").write_text('{"n": 1}\n')
    assert numbers("odd*2#3.jsonl") == [1], "a file of that very name comes first"


def test_rows_are_drawn_by_the_seed(folder):
    drawn = numbers("a.jsonl#4")
    assert len(drawn) == 4
    assert drawn == sorted(drawn) == numbers("a.jsonl#4")
    assert any(numbers("a.jsonl#4", seed=seed) != drawn for seed in range(5))
    assert Counter(numbers("a.jsonl#25")).most_common(6)[5][1] == 2
    assert set(Counter(numbers("a.jsonl#25")).values()) == {2, 3}


def test_mixing(folder):
    assert len(numbers("a.jsonl*0.3", "b.jsonl")) == 13
    assert numbers("a.jsonl*2") == [n for n in range(10) for _ in range(2)]
    assert len(numbers("*.jsonl*0.5")) == 10
    assert len(numbers(".#4*0.5")) == 2


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("c.jsonl", "no such file; did you mean [ab].jsonl"),
        ("no/x.json", r"no folder no\); a data set on the Hugging Face hub is written hf::no/x.json"),
        ("*.csv", "no file matches"),
        ("a.jsonl#0", "takes no rows"),
        ("a.jsonl*0", "takes no rows"),
        ("hf::name", "is written hf::org/name"),
        ("hf::org/name:a:b:c", "is written hf::org/name"),
        ("empty.jsonl", "is empty"),
        ("x.txt", r"\.txt is not read; give \.json, \.jsonl, \.csv, \.tsv or \.parquet"),
        ("x.parquet.gz", "is not read"),
        ("bare", "in this folder"),
    ],
)
def test_what_cannot_be_read_is_said(folder, word, message):
    (folder / "empty.jsonl").write_text("")
    (folder / "x.txt").write_text("x")
    (folder / "x.parquet.gz").write_text("x")
    (folder / "bare").mkdir()
    with pytest.raises(UsageError, match=message):
        find_datasets([word])


def test_hub_names():
    for word, config, split in (
        ("hf::o/n", None, "train"),
        ("hf::o/n:test", None, "test"),
        ("ms::o/n:main:test#5*2", "main", "test"),
        ("hf::o/n:train[:10%]", None, "train[:10%]"),
    ):
        (dataset,) = find_datasets([word])
        (part,) = dataset.parts
        assert (part.hub, part.id, part.config, part.split) == (word[:2], "o/n", config, split)
    assert (dataset.rows, find_datasets(["ms::o/n#5*2"])[0].weight) == (None, 2.0)


def test_a_hub_set_is_read_through_datasets(folder, monkeypatch):
    datasets = pytest.importorskip("datasets")
    real = datasets.load_dataset
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return real("json", data_files={"test": str(folder / "a.jsonl")}, split=split, cache_dir=str(folder / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub._load.cache_clear()
    assert numbers("hf::org/name:test") == list(range(10))
    assert len(numbers("hf::org/name:test#3")) == 3
    assert asked == [("org/name", None, "test")]
    (dataset,) = find_datasets(["hf::org/name:test"])
    assert next(record.source for record in dataset.records(0)) == "hf::org/name:test row 1"
    assert dataset.parts[0].digest()
    hub._load.cache_clear()


def test_a_hub_that_does_not_answer_is_said(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub._load.cache_clear()
    with pytest.raises(OssiaError, match=r"hf::org/name:train: cannot be loaded \(no route\)"):
        numbers("hf::org/name")


def test_modelscope_is_asked_for_when_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "modelscope.msdatasets", None)
    hub._load.cache_clear()
    with pytest.raises(OssiaError, match="needs modelscope"):
        numbers("ms::org/name")


def test_rows_of_a_list_know_their_line(folder):
    (folder / "l.json").write_text(json.dumps([{"n": 1}, {"n": 2}], indent=1))
    assert [record.source for record in read_datasets(find_datasets(["l.json"]), 0)] == ["l.json:2", "l.json:5"]
