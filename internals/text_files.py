"""A source of text: its files, their names, and whether they are the ones that were prepared before."""

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from internals.file_walk import file_type, find_files
from internals.files import sha256
from internals.reader import Chunk, ReadOptions, reading
from internals.readers import make_reader, read_chunks
from internals.screen import file_size, listed, plural, printable
from internals.start import UserError
from internals.tokenizer_json import END_OF_TEXT

SAMPLE = Path(__file__).resolve().parents[1] / "sample" / "articles.jsonl"
FEW_DOCUMENTS = 50  # below this many, choosing whole documents cannot give the validation share


@dataclass(frozen=True)
class SourceFile:
    name: str  # relative to the source's folder or to the hub's repository
    bytes: int
    sha256: str | None


class Source:
    """Where text comes from: `fetch(number)` returns the path of `files[number]`, `summary()` what to print about it.

    The defaults below are those of files that are already on this machine.
    """

    identity: dict[str, Any]  # what was asked for; a folder of shards resumes only with the same
    files: list[SourceFile]
    text_bytes: float  # size of the text in UTF-8, about; of JSON, of all that is in the file
    counts_as_long = False  # not read only to see whether it is long enough
    missing_bytes = 0  # of the files not done that must be downloaded, those that have arrived included
    peak_bytes = 0  # the most that they take on the disk at one time
    bytes_on_disk = 0  # what they take now
    seconds_per_byte = 0.0  # of the last download, or of several that share the line
    download_folder: Path  # whose disk they take; it may not exist yet

    def recall(self, provenance: dict[str, Any]) -> None:
        """Take the size from the entry in the meta.json of a finished folder, where it is not known yet."""

    def resolve(self, known: dict[str, Any]) -> dict[str, Any]:
        """Find out what must stay the same in later runs, unless an earlier run has. Takes and returns plain data."""
        return {}

    def release(self, before: int) -> None:
        """The files before this number are no longer needed."""

    def chunks(self, number: int, options: ReadOptions) -> Iterator[Chunk]:
        """The chunks of a file."""
        return read_chunks(self.fetch(number), self.files[number].name, options)

    def has_few_documents(self) -> bool:
        """Whether there are too few documents to hold out whole ones."""
        return False

    def sample_files(self, size: int) -> range:
        """The numbers of the files that a sample of `size` bytes of text is taken from."""
        return range(len(self.files))

    def provenance(self) -> dict[str, Any]:
        """The source's entry in meta.json."""
        return self.identity


class LocalFiles(Source):
    """Files, folders and globs; `sample` is the embedded one.

    Contents are hashed, so another run notices a change. Before and after reading a file, this run checks that its size
    and time are still those of the beginning.
    """

    def __init__(self, sources: tuple[str, ...], options: ReadOptions, ours: Collection[Path] = ()):
        found = find_files(sources, SAMPLE, ours)
        self.name, self.root, self.left_out, self.options = listed(sources), found.root, found.reasons(), options
        self.files, self.text_bytes = [], 0
        self.seen: list[tuple[int, int]] = []  # size and time of each file when it was hashed
        self.without_separator, self.with_end_of_text = [], []  # names of .txt files
        with reading(self.name):
            total = sum(path.stat().st_size for path in found.paths)
        with tqdm(total=total, unit="B", unit_scale=True, desc="hashing", disable=None, leave=False, delay=1) as bar:
            for path in found.paths:
                self.add(path)
                bar.update(self.files[-1].bytes)
        listing = "".join(f"{file.sha256}  {file.name}\n" for file in self.files)  # what `sha256sum FILE...` prints
        self.identity = {
            "kind": "sample" if sources == ("sample",) else "files",
            "files": len(self.files),
            "bytes": total,
            "sha256": hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest(),
        }

    def add(self, path: Path) -> None:
        name = path.relative_to(self.root).as_posix()
        with reading(name):
            self.seen.append(size_and_time(path))
        checked, separator = make_reader(path, name, self.options).check(), self.options.separator
        self.text_bytes += checked.text_bytes
        if file_type(name) == ".txt" and separator.strip("\r\n") and not checked.found:
            self.without_separator.append(name)
        if file_type(name) == ".txt" and not separator and checked.found:
            self.with_end_of_text.append(name)
        with reading(name):
            self.files.append(SourceFile(name, path.stat().st_size, sha256(path)))

    def fetch(self, number: int) -> Path:
        path, name = self.root / self.files[number].name, self.files[number].name
        with reading(name):
            if size_and_time(path) != self.seen[number]:
                raise UserError(f"{name}: has changed since the command began; start again when it is complete")
        return path

    def has_few_documents(self) -> bool:
        documents = 0
        for number, file in enumerate(self.files):
            if file_type(file.name) == ".txt" and not self.options.separator:
                documents += 1
            else:
                chunks = self.chunks(number, self.options)
                articles = (article for chunk in chunks if chunk.starts for article in chunk.articles())
                documents += sum(1 for _ in islice((a for a in articles if not a.is_blank), FEW_DOCUMENTS))
            if documents >= FEW_DOCUMENTS:
                return False
        return True

    def summary(self) -> str:
        text = f"{printable(self.name)}: {plural(len(self.files), 'file')} of {file_size(self.identity['bytes'])}"
        text += f"; {printable(self.left_out)}" if self.left_out else ""
        if self.without_separator:
            text += (
                f"\nnote: the --separator does not occur in {listed(self.without_separator)}; "
                "each file without it is one document"
            )
        if self.with_end_of_text:
            text += (
                f"\nnote: {END_OF_TEXT} is taken as ordinary text in {listed(self.with_end_of_text)}; "
                f"if it separates documents there, give --separator '{END_OF_TEXT}'"
            )
        return text


def size_and_time(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
