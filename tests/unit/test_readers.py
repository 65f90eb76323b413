"""Files of every kind, whole, packed, damaged."""

from __future__ import annotations

import csv
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from ossia.data import readers
from ossia.data.readers import BadRow, count_records, decode, read_records, suffix_of

ROWS = [{"instruction": f'q{i}\n,"{i}', "output": "答" * i} for i in range(1, 5)]


def values(path):
    """Rows as (value or error text, place behind the file's name)."""
    found = []
    for record in read_records(path):
        try:
            value = decode(record)
        except BadRow as error:
            value = str(error)
        found.append((value, record.source.removeprefix(str(path))))
    return found


def write(path, data: bytes):
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = pa.Codec("zstd").compress(data, asbytes=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_gives_the_same_rows(tmp_path, kind, packed):
    path = tmp_path / f"a{kind}{packed}"
    if kind == ".parquet":
        if packed:
            assert suffix_of(path) == ""
            return
        pa.parquet.write_table(pa.Table.from_pylist(ROWS), path)
    elif kind == ".json":
        write(path, b"\xef\xbb\xbf" + json.dumps(ROWS, ensure_ascii=False, indent=2).encode())
    elif kind == ".jsonl":
        write(path, b"\n".join(json.dumps(row).encode() for row in ROWS) + b"\n\n")
    else:
        cells = "".join('"{}","{}"\r\n'.format(*(v.replace('"', '""') for v in row.values())) for row in ROWS)
        write(path, ("instruction,output\r\n" + cells).encode())
    found = values(path)
    assert [value for value, _ in found] == ROWS
    places = {".jsonl": [":1", ":2", ":3", ":4"], ".json": [":2", ":6", ":10", ":14"], ".csv": [":2", ":4", ":6", ":8"]}
    assert [place for _, place in found] == places.get(kind, [f" row {i}" for i in range(1, 5)])
    assert count_records(path) == 4


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_a_list_is_read_through_a_window_of_any_size(tmp_path, monkeypatch, size):
    monkeypatch.setattr(readers, "_CHUNK", size)
    rows = [*ROWS, 12.5, -300, "x\n", None, [], {"deep": [[1, {"a": "]"}]]}]
    path = write(tmp_path / "a.json", json.dumps(rows, indent=1, ensure_ascii=False).encode())
    assert [value for value, _ in values(path)] == rows
    assert values(write(path, b" [ ] ")) == []
    assert values(write(path, b"[]")) == []


@pytest.mark.parametrize(
    ("name", "data", "read", "message"),
    [
        ("a.json", b'[{"a": 1},\n]', 1, ":2: broken JSON"),
        ("a.json", b'[{"a": 1}\n{"a": 2}]', 1, ":2: broken JSON: ',' or ']' expected"),
        ("a.json", b'[{"a": 1},\n{"a": ', 1, ":2: broken JSON"),
        ("a.json", b'[{"a": 1}', 1, ":1: broken JSON"),
        ("a.json", b"[1] 2", 1, "text after the list"),
        ("a.json", b"[" * 100_000, 0, "nested too deeply"),
        ("a.json", b'[{"a": 1}, {"a": 1, "a": 2}]', 1, "the key 'a' stands in one object twice"),
        ("a.jsonl", b'{"a": 1}\n{"b": {"a": 1, "a": 2}}\n', 1, ":2: not readable as JSON (the key 'a' stands in one"),
        ("a.csv", b"a,b\n1,2\ncaf\xe9,3\n", 0, "it may be cp1252: iconv"),
        ("a.csv", b"a;b\nhi, you;yo; x\n", 0, ":2: 3 cells under 2 columns; quote cells with semicolons"),
        ("a.csv", b'a\tb\n"hi" he said\tyo\n', 0, "not CSV ('\\t' expected after"),
        ("a.json", b"[" + b"1" * 5000 + b"]", 0, "not readable"),
        ("a.json", b'["\xff"]', 0, "not UTF-8"),
        ("a.jsonl", b'{"a": \n', 0, ":1: broken JSON at character"),
        ("a.jsonl", b'{"a": 1}\n\xff\xfe\n', 1, ":2: not UTF-8 (byte 0"),
        ("a.jsonl", b"[" * 100_000, 0, ":1: nested too deeply"),
        ("a.csv", b"a,b\n1,2\n3\n", 1, ":3: 1 cells under 2 columns; write every cell"),
        ("a.csv", b"a,a\n1,2\n", 0, ":1: the first line must name every column"),
        ("a.csv", b'a,b\n1,2\n"3', 1, ":3: not CSV"),
        ("a.csv", b"a,b\n1,\xff\n", 0, "not UTF-8"),
        ("a.parquet", b"PAR1 no", 0, "not a Parquet file"),
    ],
)
def test_damage_is_named_and_what_came_before_is_read(tmp_path, name, data, read, message):
    found = values(write(tmp_path / name, data))
    assert len(found) == read + 1
    assert message in found[-1][0]
    assert name in found[-1][0]
    assert count_records(tmp_path / name) == read + 1


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_a_cut_archive_is_named_and_its_beginning_is_read(tmp_path, packed):
    path = write(tmp_path / f"a.jsonl{packed}", b"".join(f'{{"n": {i * 7919}}}\n'.encode() for i in range(200_000)))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = values(path)
    assert len(found) > 10_000
    assert found[9_999] == ({"n": 9_999 * 7919}, ":10000")
    assert "cut or damaged" in found[-1][0] or "broken JSON" in found[-1][0]


LISTED = [{"a": 1}, {"a": {"b": "}"}}, {"a": "x\n"}]
FORMS = {
    "list": json.dumps(LISTED),
    "list over lines": json.dumps(LISTED, indent=2),
    "list, a row a line": "[\n" + ",\n".join(map(json.dumps, LISTED)) + "\n]\n",
    "list, brackets with rows": "[" + ",\n".join(map(json.dumps, LISTED)) + "]",
    "lines": "\n".join(map(json.dumps, LISTED)) + "\n",
    "lines with gaps": "\n\n" + "\n\n".join(map(json.dumps, LISTED)),
    "rows over lines": "\n".join(json.dumps(row, indent=1) for row in LISTED),
    "rows behind one another": json.dumps(LISTED[0], indent=1)
    + "".join(json.dumps(row, indent=4) for row in LISTED[1:]),
}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_json_is_told_by_its_beginning(tmp_path, name, form, encoding):
    path = write(tmp_path / name, FORMS[form].encode(encoding))
    assert [value for value, _ in values(path)] == LISTED
    assert count_records(path) == 3


def test_one_row_is_a_file_too(tmp_path):
    assert values(write(tmp_path / "a.json", b'{"a": 1}')) == [({"a": 1}, ":1")]
    assert [value for value, _ in values(write(tmp_path / "b.json", b'{\n "a": 1\n}'))] == [{"a": 1}]
    assert values(write(tmp_path / "c.jsonl", b" \n\n")) == []


def test_a_damaged_first_line_costs_only_itself(tmp_path):
    for damaged in (b'{"a": ', b"[", b'[{"a": 1},'):
        found = values(write(tmp_path / "a.jsonl", damaged + b'\n{"a": 2}\n{"a": 3}\n'))
        assert [place for _, place in found] == [":1", ":2", ":3"], damaged
        assert "broken JSON" in found[0][0]


@pytest.mark.parametrize(
    ("name", "cells"),
    [("a.csv", ","), ("a.csv", ";"), ("a.csv", "\t"), ("a.csv", "|"), ("a.tsv", "\t"), ("a.csv.gz", ";")],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_cells_between_commas_semicolons_or_tabs(tmp_path, name, cells, encoding):
    rows = [{"instruction": f'q{cells}"{i}"\n, and; more', "output": "答, 案"} for i in range(30)]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=cells)
    writer.writeheader()
    writer.writerows(rows)
    path = write(tmp_path / name, text.getvalue().encode(encoding))
    assert [value for value, _ in values(path)] == rows


def test_a_single_column_needs_nothing_between_cells(tmp_path):
    assert values(write(tmp_path / "a.csv", b"text\none\ntwo; three\n")) == [
        ({"text": "one"}, ":2"),
        ({"text": "two; three"}, ":3"),
    ]


def test_cells_that_could_be_divided_in_two_ways_are_named(tmp_path):
    ((reason, _),) = values(write(tmp_path / "a.csv", b"a;b\tc\n1;2\t3\n4;5\t6\n"))
    assert "cells may be divided by ';' or '\\t'; write them with commas" in reason


@pytest.mark.parametrize(
    ("name", "encoding", "text"),
    [
        ("a.csv", "cp1252", "question,answer\ncafé,thé\nhôtel,été\n"),
        ("a.json", "cp1252", '[{"question": "café",\n"answer": "été"}]'),
        ("a.jsonl", "cp1252", '{"question": "café"}\n{"question": "été"}\n{"question": "tea"}\n'),
        ("a.jsonl", "gb18030", '{"question": "你好世界"}\n{"question": "早上好吗"}\n'),
        ("a.csv", "gb18030", "question,answer\n你好世界,早上好吗\n晚安,再见\n"),
    ],
)
def test_other_encodings_are_one_error_with_the_way_out(tmp_path, name, encoding, text):
    path = write(tmp_path / name, text.encode(encoding))
    ((reason, _),) = values(path)
    assert "not UTF-8 from line" in reason
    assert f"it may be {encoding}: iconv -f {encoding} -t utf-8 FILE > NEW" in reason


def test_csv_of_pandas_and_of_excel(tmp_path):
    indexed = write(tmp_path / "a.csv", b",question,answer\n0,q,a\n1,r,b\n")
    assert values(indexed)[0][0] == {"__index_level_0__": "0", "question": "q", "answer": "a"}
    assert values(write(tmp_path / "b.csv", b"sep=;\r\nquestion;answer\r\nq, r;a\r\n"))[0][0] == {
        "question": "q, r",
        "answer": "a",
    }


def test_blank_lines_at_the_beginning_change_nothing(tmp_path):
    listed = write(tmp_path / "a.json", b'\n\n[\n {"text": "a"}\n]\n')
    assert values(listed) == [({"text": "a"}, ":4")]
    spread = write(tmp_path / "b.jsonl", b'\n{\n "text": "a"\n}\n{\n "text": "b"\n}\n')
    assert [value for value, _ in values(spread)] == [{"text": "a"}, {"text": "b"}]
    damaged = values(write(tmp_path / "c.jsonl", b'{"text": \n\n{"text": "b"}\n\n{"text": "c"}\n'))
    assert [place for _, place in damaged] == [":1", ":3", ":5"]


def test_tabs_win_in_a_tsv(tmp_path):
    found = values(write(tmp_path / "a.tsv", b"a,b\tc\n1,2\t3\n"))
    assert found == [({"a,b": "1,2", "c": "3"}, ":2")]
    assert values(write(tmp_path / "a.csv", b"a,b\tc\n1,2\t3\n"))[0][0] == {"a": "1", "b\tc": "2\t3"}
