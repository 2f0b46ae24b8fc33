"""Articles from the lines of .jsonl, from .json documents, from .txt and from WikiExtractor's output."""

import codecs
import dataclasses
import hashlib
import html
import json
import os
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from internals import reader
from internals.bulk_encoding import last_cut
from internals.encodings import Block
from internals.file_walk import file_type
from internals.parquet import ParquetReader
from internals.reader import CHUNK_ROWS, Article, Chunk, Reader, ReadOptions, reading, to_utf8
from internals.start import UserError, first_line
from internals.tokenizer import load_tokenizer

DOCUMENT_BYTES = 1 << 31  # the longest text that is parsed as one JSON document, in memory


def make_reader(path: Path, name: str, options: ReadOptions) -> Reader:
    """The reader of the file at `path`, which messages call `name`."""
    kind = file_type(name)
    if kind == ".txt" and options.separator:
        return SeparatedReader(path, name, options)
    return READERS[kind](path, name, options)


def read_chunks(path: Path, name: str, options: ReadOptions) -> Iterator[Chunk]:
    """The chunks of the file at `path`, which messages call `name`."""
    with reading(name):
        yield from make_reader(path, name, options).chunks()


def begins_with_a_value(text: str) -> bool:
    """Whether a whole JSON value stands at the beginning, whatever follows."""
    try:
        json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return True


class JsonReader(Reader):
    """JSON Lines or, if the first line is not a whole object, other JSON: an array, or pretty-printed values."""

    def chunks(self) -> Iterator[Chunk]:
        rows = None if self.begins_with_an_object() else self.document()
        if rows is None:
            yield from self.records(b"\n")
            return
        size = os.path.getsize(self.path)
        for first in range(0, len(rows), CHUNK_ROWS):
            part = rows[first : first + CHUNK_ROWS]
            yield Chunk(self, first, len(part), size * (first + len(part)) // len(rows), part)

    def articles(self, chunk: Chunk) -> Iterator[Article]:
        if isinstance(chunk.data, list):
            for number, row in enumerate(chunk.data, chunk.first + 1):
                yield self.article(row, f"{self.name}, record {number}")
            return
        for number, line in enumerate(chunk.data.split(b"\n"), chunk.first + 1):
            if line.strip():
                where = f"{self.name}, line {number}"
                try:
                    row = json.loads(line.decode("utf-8-sig", "surrogateescape"))
                except (ValueError, RecursionError) as error:
                    is_json_error = isinstance(error, json.JSONDecodeError)
                    reason = f"{error.msg}, column {error.colno}" if is_json_error else first_line(error)
                    raise UserError(f"{where}: invalid JSON ({reason}); fix or delete it") from error
                yield self.article(row, where)

    def begins_with_an_object(self) -> bool:
        """Whether the first line is an object, or too long to tell."""
        head = next(self.blocks(), Block(b"", 0)).data
        text = head.decode("utf-8-sig", "surrogateescape").lstrip()
        line, newline, _ = text.partition("\n")
        try:
            return isinstance(json.loads(line), dict)
        except (ValueError, RecursionError):
            is_long = not newline and len(head) == reader.CHUNK_BYTES
            return not text or (is_long and not text.startswith("[") and not begins_with_a_value(text))

    def document(self) -> list[Any] | None:
        """The rows of a file of JSON values, arrays taken apart; None if it is not such a file."""
        parts, size = [], 0
        for block in self.blocks():
            parts.append(block.data)
            size += len(block.data)
            if size > DOCUMENT_BYTES:
                head = parts[0].decode("utf-8-sig", "ignore").lstrip()
                if not head.startswith("[") and head.partition("\n")[0].strip() != "{":
                    return None
                command = "jq -c '.[]'" if head.startswith("[") else "jq -c ."
                raise UserError(
                    f"{self.name}: is one JSON document of more than 2 GB; write a line for each article ({command})"
                )
        text = b"".join(parts).decode("utf-8-sig", "surrogateescape")
        rows, place, decoder = [], 0, json.JSONDecoder()
        try:
            while (start := JSON_SPACE.match(text, place).end()) < len(text):
                value, place = decoder.raw_decode(text, start)
                rows += value if isinstance(value, list) else [value]
        except (ValueError, RecursionError) as error:
            if text.lstrip().startswith("["):
                raise UserError(f"{self.name}: invalid JSON ({first_line(error)}); fix it there") from error
            return None
        return rows


JSON_SPACE = re.compile(r"[ \t\n\r]*")


class WikiExtractorReader(JsonReader):
    """WikiExtractor's output: lines of JSON, or `<doc id="12" url="..." title="Anarchism">` ... `</doc>`."""

    HEAD = re.compile(rb'\s*<doc id="([^"]*)"(?: (?:revid|url)="[^"]*")*(?: title="(.*)")?>\r?\n')

    def chunks(self) -> Iterator[Chunk]:
        head = next(self.blocks(), Block(b"", 0)).data.lstrip()
        if not head.startswith(b"<doc "):
            yield from super().chunks()
            return
        for chunk in self.records(b"</doc>"):
            *records, rest = chunk.data.split(b"</doc>")
            if rest.strip():
                raise UserError(f"{self.name}: does not end with </doc>, so it was cut short; extract it again")
            yield dataclasses.replace(chunk, data=tuple(records))

    def articles(self, chunk: Chunk) -> Iterator[Article]:
        if not isinstance(chunk.data, tuple):
            yield from super().articles(chunk)
            return
        for number, record in enumerate(chunk.data, chunk.first + 1):
            if head := self.HEAD.match(record):
                title = html.unescape((head[2] or b"").decode("utf-8", "surrogateescape"))
                text = record[head.end() :].replace(b"\r\n", b"\n").decode("utf-8", "surrogateescape")
                text = html.unescape(text).strip("\n")
                yield Article.from_row(head[1].decode(), title or None, text.removeprefix(f"{title}\n").lstrip("\n"))
            elif record.strip():
                raise UserError(f"{self.name}, <doc> {number}: does not begin with <doc id=...>; fix or delete it")


class TxtReader(Reader):
    """The file is one document. Its content decides the split, so each call of `chunks` first reads all of it."""

    def chunks(self) -> Iterator[Chunk]:
        digest, tokenizer = self.digest(), load_tokenizer(self.options.tokenizer)
        text, piece, decoder = "", 0, codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        for block in self.blocks():
            if text and ((cut := last_cut(text, tokenizer)) < len(text) or cut > 4 * reader.CHUNK_BYTES):
                article = Article(digest, None, to_utf8(text[:cut]))
                yield Chunk(self, piece, 1, block.position, article, starts=piece == 0, ends=False)
                text, piece = text[cut:], piece + 1
            text += decoder.decode(block.data)
        article = Article(digest, None, to_utf8(text + decoder.decode(b"", final=True)))
        yield Chunk(self, piece, 1, os.path.getsize(self.path), article, starts=piece == 0)

    def digest(self) -> bytes:
        digest = hashlib.sha256()
        for block in self.raw_blocks():
            digest.update(block.data)
        return digest.digest()

    def articles(self, chunk: Chunk) -> Iterator[Article]:
        yield chunk.data


class Part(NamedTuple):
    text: str
    ends: bool  # False: the next part continues its document
    position: int


class SeparatedReader(Reader):
    """Documents stand between separators; newlines around a separator belong to it.

    A document's text decides its split; of a document longer than a few chunks, the first part does.
    """

    def chunks(self) -> Iterator[Chunk]:
        first, batch, size, key = 0, [], 0, None
        for part in self.parts():
            long = key is not None or not part.ends
            if batch and (long or size > reader.CHUNK_BYTES):
                yield Chunk(self, first, len(batch), part.position, batch)
                first, batch, size = first + len(batch), [], 0
            if long:
                starts, key = key is None, key or hashlib.sha256(part.text.encode("utf-8", "surrogatepass")).digest()
                article = Article(key, None, to_utf8(part.text))
                yield Chunk(self, first, 1, part.position, [article], starts=starts, ends=part.ends)
                first, key = first + 1, None if part.ends else key
            else:
                batch.append(Article(None, None, to_utf8(part.text)))
                size += len(part.text)
        if batch:
            yield Chunk(self, first, len(batch), os.path.getsize(self.path), batch)

    def parts(self) -> Iterator[Part]:
        """The documents, long ones in parts. A blank one at the beginning or the end of the file is left out."""
        end, tokenizer = Block(b"", os.path.getsize(self.path)), load_tokenizer(self.options.tokenizer)
        separator = re.compile(re.escape(self.options.separator).replace("\\\n", "\r?\n"))
        decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        text, is_first, continues = "", True, False
        for block in chain(self.blocks(), [end]):
            text += decoder.decode(block.data, final=block is end)
            *whole, text = separator.split(text)
            if block is end and (text.strip() or continues):
                whole.append(text)
            for document in whole:
                document = document.rstrip("\r\n") if continues else document.strip("\r\n")
                if continues or document.strip() or not is_first:
                    yield Part(document, True, block.position)
                is_first = continues = False
            if block is not end and len(text) > 4 * reader.CHUNK_BYTES:
                certain = text[: -2 * len(self.options.separator)]  # the rest may be a separator's beginning
                cut = last_cut(certain, tokenizer)
                yield Part(text[:cut] if continues else text[:cut].lstrip("\r\n"), False, block.position)
                text, is_first, continues = text[cut:], False, True

    def articles(self, chunk: Chunk) -> Iterator[Article]:
        yield from chunk.data


READERS = {
    ".parquet": ParquetReader,
    ".jsonl": JsonReader,
    ".json": JsonReader,
    ".txt": TxtReader,
    "wiki": WikiExtractorReader,
}
