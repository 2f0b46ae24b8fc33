"""Articles from the rows of parquet files."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from internals import reader
from internals.encodings import FileCheck
from internals.reader import CHUNK_ROWS, Article, Chunk, Reader, is_utf8
from internals.start import UserError, first_line


class ParquetReader(Reader):
    def check_content(self) -> FileCheck:
        with pq.ParquetFile(self.opened()) as file:
            self.columns(file)
            return FileCheck(False, self.text_bytes(file.metadata))

    @property
    def names(self) -> tuple[str | None, ...]:
        """The columns of an article: id, title and text."""
        return ("id", self.options.title_column, self.options.text_column)

    def text_bytes(self, metadata: pq.FileMetaData) -> int:
        """Size of the titles and texts before compression."""
        groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
        columns = (group.column(number) for group in groups for number in range(group.num_columns))
        return sum(column.total_uncompressed_size for column in columns if column.path_in_schema in self.names[1:])

    def columns(self, file: pq.ParquetFile) -> list[str]:
        """The columns to read."""
        have, text = file.schema_arrow.names, self.options.text_column
        if text not in have:
            texts = ", ".join(field.name for field in file.schema_arrow if is_text(field.type))
            advice = f"give --text-column one of: {texts}" if texts else "none of its columns is text; leave it out"
            raise UserError(f"{self.name}: has no column {text!r}; {advice}")
        for name in self.names:
            if have.count(name) > 1:
                raise UserError(f"{self.name}: has {have.count(name)} columns called {name!r}; rename all but one")
        kind = file.schema_arrow.field(text).type
        if not is_text(kind):
            raise UserError(f"{self.name}: column {text!r} is not text ({kind}); give another --text-column")
        return [name for name in self.names if name in have]

    def chunks(self) -> Iterator[Chunk]:
        with pq.ParquetFile(self.opened()) as file:
            columns = self.columns(file)
            size, rows, first = os.path.getsize(self.path), file.metadata.num_rows, 0
            for batch in file.iter_batches(batch_size=CHUNK_ROWS, columns=columns, use_threads=False):
                for part in halves(batch):
                    done = first + part.num_rows
                    yield Chunk(self, first, part.num_rows, size * done // rows, part)
                    first = done

    def articles(self, chunk: Chunk) -> Iterator[Article]:
        columns = [self.column(chunk, name) for name in self.names]
        for row in zip(*columns, strict=True):
            yield Article.from_row(*row)

    def column(self, chunk: Chunk, name: str | None) -> list[Any]:
        """A column as Python values; all None if the column is missing. Text stays as bytes, except in ids."""
        if name not in chunk.data.schema.names:
            return [None] * chunk.count
        values = chunk.data.column(name)
        try:
            if not is_text(values.type) or (name == "id" and "binary" in str(values.type)):
                return values.to_pylist()
            if pa.types.is_dictionary(values.type):
                values = values.dictionary_decode()
            texts = as_bytes(values).to_pylist()  # as strings, Arrow would stop at invalid UTF-8
        except (pa.ArrowException, ValueError, TypeError, ArithmeticError, RecursionError) as error:
            if name == "id":
                return self.odd_ids(values)
            raise self.unreadable(name, values, error) from error
        if "binary" in str(values.type):
            self.refuse_pictures(name, values, texts)
        return [text and text.decode("utf-8", "surrogateescape") for text in texts] if name == "id" else texts

    def odd_ids(self, values: pa.Array) -> list[Any]:
        """Ids without a Python value, such as a date in the year 20,000: as Arrow's text, or as a number."""
        for kind in (pa.string(), pa.int64(), pa.int32()):
            with contextlib.suppress(pa.ArrowException, ValueError):
                return values.cast(kind).to_pylist()
        raise self.unreadable("id", values, "its values are out of range")

    def unreadable(self, name: str, values: pa.Array, reason: Exception | str) -> UserError:
        text = reason if isinstance(reason, str) else first_line(reason)
        return UserError(
            f"{self.name}: column {name!r} ({values.type}) cannot be read ({text}); fix or drop that column"
        )

    def refuse_pictures(self, name: str, values: pa.Array, texts: list[bytes | None]) -> None:
        broken = sum(bool(text) and not text.isascii() and not is_utf8(text) for text in texts)
        if 2 * broken <= len(texts):
            return
        if name != self.options.text_column:
            raise self.unreadable(name, values, "its bytes are not UTF-8 text")
        raise UserError(f"{self.name}: column {name!r} holds bytes that are not UTF-8 text; give another --text-column")


def is_text(kind: pa.DataType) -> bool:
    """Strings and bytes in all their forms, and a column of nulls, which is empty text."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    text = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
    return str(kind) in text


def as_bytes(values: pa.Array) -> pa.Array:
    if pa.types.is_null(values.type):
        return values
    if str(values.type) == "string_view":
        values = values.cast(pa.binary_view())
    return values if str(values.type) == "binary_view" else values.cast(pa.large_binary())


def halves(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """The batch, halved until each part is at most four chunks long or one row."""
    if batch.nbytes <= 4 * reader.CHUNK_BYTES or batch.num_rows == 1:
        yield batch
    else:
        half = batch.num_rows // 2
        yield from halves(batch.slice(0, half))
        yield from halves(batch.slice(half))
