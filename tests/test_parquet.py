"""internals/parquet.py: every kind of text column is read as text; for any other, file and column are named."""

import datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from articles import command, config, files, make_articles
from conftest import assert_user_error, run_script

from internals.reader import ReadOptions
from internals.readers import read_chunks
from internals.shards import read_meta
from internals.start import UserError
from prepare_data import prepare

ROWS = make_articles(80)
TEXTS = [row["text"] for row in ROWS]
KINDS = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "binary": pa.binary(),
    "large_binary": pa.large_binary(),
    "binary_view": pa.binary_view(),
    "dictionary of string": pa.dictionary(pa.int32(), pa.string()),
    "dictionary of large_string": pa.dictionary(pa.int64(), pa.large_string()),
    "dictionary of binary": pa.dictionary(pa.int32(), pa.binary()),
}


def column(kind, values):
    if "dictionary" in kind:
        value_type = KINDS[kind].value_type
        plain = pa.array(values).cast(value_type)
        return pa.DictionaryArray.from_arrays(pa.array(range(len(values)), KINDS[kind].index_type), plain)
    return pa.array(values).cast(pa.binary() if "binary" in kind else pa.string()).cast(KINDS[kind])


def articles(path):
    return [article for chunk in read_chunks(path, path.name, ReadOptions()) for article in chunk.articles()]


@pytest.mark.parametrize("where", ["text", "title", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_string_is_text(tmp_path, kind, where):
    plain = {"id": [row["id"] for row in ROWS], "title": [row["title"] for row in ROWS], "text": TEXTS}
    pq.write_table(pa.table(plain), tmp_path / "plain.parquet")
    odd = {n: column(kind, v) if n == where or (where == "both" and n != "id") else v for n, v in plain.items()}
    pq.write_table(pa.table(odd), tmp_path / "odd.parquet")
    for name in ("plain", "odd"):
        prepare(config(tmp_path / name, tmp_path / f"{name}.parquet"))
    shards = ("train_000000.bin", "val_000000.bin")
    assert [files(tmp_path / "odd")[s] for s in shards] == [files(tmp_path / "plain")[s] for s in shards]


def test_a_column_of_nulls_is_empty_text(tmp_path):
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "in" / "a.parquet")
    pq.write_table(
        pa.table({"text": pa.nulls(7), "id": pa.nulls(7), "title": pa.nulls(7)}), tmp_path / "in" / "b.parquet"
    )
    result = run_script(*command(tmp_path / "out", tmp_path / "in"))
    assert result.returncode == 0 and "left out 7 articles without text" in result.stdout, result.stderr
    assert_user_error(run_script(*command(tmp_path / "no", tmp_path / "in" / "b.parquet")), "holds no text (7 empty")


@pytest.mark.parametrize("name", ["text", "title", "id"])
def test_two_columns_of_one_name_are_named(tmp_path, name):
    arrays = {"text": [pa.array(TEXTS)], "title": [pa.array(TEXTS)], "id": [pa.array(range(80))]}
    arrays[name] *= 2
    names = [column for column, several in arrays.items() for _ in several]
    table = pa.Table.from_arrays([array for several in arrays.values() for array in several], names)
    pq.write_table(table, tmp_path / "a.parquet")
    assert_user_error(
        run_script(*command(tmp_path / "out", tmp_path / "a.parquet")), "a.parquet", f"2 columns called '{name}'"
    )
    assert not files(tmp_path / "out")


IDS = {
    "a date in the year 20,000": pa.array([6_585_000] * 80, pa.int32()).cast(pa.date32()),
    "a time in the year 200,000": pa.array([6_248_221_600_000_000 + n for n in range(80)], pa.int64()).cast(
        pa.timestamp("ms")
    ),
    "nanoseconds": pa.array([1_700_000_000_000_000_001 + n for n in range(80)]).cast(pa.timestamp("ns")),
    "a duration": pa.array([2**62 + n for n in range(80)]).cast(pa.duration("us")),
    "lists": pa.array([[n, n] for n in range(80)]),
    "structs": pa.array([{"a": n} for n in range(80)]),
    "floats": pa.array([n / 7 for n in range(80)]),
    "booleans": pa.array([n % 2 == 0 for n in range(80)]),
    "binary": pa.array([b"\xff%d" % n for n in range(80)]),
    "decimals": pa.array(range(80)).cast(pa.decimal128(30, 2)),
    "nulls": pa.nulls(80),
    "nested dates": pa.array([[6_585_000 + n] for n in range(80)], pa.list_(pa.int32())).cast(pa.list_(pa.date32())),
}


@pytest.mark.parametrize("name", IDS)
def test_odd_ids(tmp_path, name):
    pq.write_table(pa.table({"id": IDS[name], "text": TEXTS}), tmp_path / "a.parquet")
    if name == "nested dates":  # Arrow has neither Python values nor text for them
        with pytest.raises(UserError, match=r"a\.parquet: column 'id' .* cannot be read"):
            prepare(config(tmp_path / "out", tmp_path / "a.parquet"))
    else:
        prepare(config(tmp_path / "out", tmp_path / "a.parquet"))
        assert sum(split["articles"] for split in read_meta(tmp_path / "out")["splits"].values()) == 80


def test_titles_that_are_numbers_or_dates(tmp_path):
    day = datetime.date(2023, 11, 1)
    for title, want in (
        ([7], "7"),
        ([1.5], "1.5"),
        ([day], "2023-11-01"),
        ([None], None),
        ([float("nan")], None),
        ([[1]], None),
    ):
        pq.write_table(pa.table({"title": title, "text": ["x"]}), tmp_path / "a.parquet")
        assert [article.title for article in articles(tmp_path / "a.parquet")] == [want]


def test_a_title_that_cannot_be_read_names_its_column(tmp_path):
    title = pa.array([6_585_000] * 80, pa.int32()).cast(pa.date32())
    pq.write_table(pa.table({"title": title, "text": TEXTS}), tmp_path / "a.parquet")
    assert_user_error(run_script(*command(tmp_path / "out", tmp_path / "a.parquet")), "a.parquet", "'title'", "date32")


def test_without_the_column_of_the_text_the_columns_of_text_are_named(tmp_path):
    for columns, advice in (
        ({"views": [1], "title": ["x"], "body": ["x"]}, "give --text-column one of: title, body"),
        ({"views": [1]}, "none of its columns is text; leave it out"),
    ):
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        with pytest.raises(UserError, match=rf"has no column 'text'; {advice}$"):
            prepare(config(tmp_path / "out", tmp_path / "a.parquet"))


@pytest.mark.parametrize("values", [[1, 2], [1.5], [[b"x"]], [{"a": 1}], [True]])
def test_a_column_that_is_not_text_is_named_before_anything_is_written(tmp_path, values):
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "in" / "a.parquet")
    pq.write_table(pa.table({"text": values}), tmp_path / "in" / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet: column 'text' is not text"):
        prepare(config(tmp_path / "out", tmp_path / "in"))
    assert not files(tmp_path / "out")


@pytest.mark.parametrize(("name", "advice"), [("text", "another --text-column"), ("title", "fix or drop that column")])
def test_pictures_are_not_text(tmp_path, name, advice):
    pictures = {name: [b"\x89PNG\xff\xfe" + bytes(50)] * 60}
    pq.write_table(pa.table({"text": TEXTS[:60]} | pictures), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=rf"a\.parquet: column '{name}' .*; .*{advice}"):
        articles(tmp_path / "a.parquet")
