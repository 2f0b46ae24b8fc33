"""The encoding of text files: a byte-order mark decides, else --encoding. A file that is not text is refused."""

import codecs
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from internals.start import UserError

BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
LONG_NUL_RUN = bytes(64)  # no text has it; files that a crash left half-written do
INVALID = re.compile("[\udc80-\udcff]")  # bytes that `surrogateescape` could not decode
WESTERN = ("cp1250", "cp1252", "cp1254", "cp1257", "cp1258", "latin_1", "mac_roman")  # guesses mix them up
SAMPLE_BYTES = 1 << 16  # at the beginning of a file, from which to guess its encoding


def mark(error: UnicodeError) -> tuple[str | bytes, int]:
    """Decodes each invalid sequence to a surrogate, and encodes it, and those that a text spells out, as byte 0xFF."""
    if isinstance(error, UnicodeEncodeError):
        return b"\xff" * (error.end - error.start), error.end
    return "\udcff", error.end


codecs.register_error("mark", mark)


def check_encoding(name: str) -> None:
    """Raise UserError unless Python can decode text of this encoding piece by piece."""
    try:
        known = codecs.lookup(name)._is_text_encoding  # base64 is not a text encoding
        if known and codecs.lookup(name).name not in ("utf-16", "utf-32"):  # these insist on a byte-order mark
            codecs.getincrementaldecoder(name)("mark").decode(b"text")  # punycode knows its own error handlers only
    except (LookupError, ValueError, TypeError):
        known = False
    if not known:
        raise UserError(f"--encoding {name}: is not a text encoding that Python knows; give utf-16, cp1252, ...")


class Block(NamedTuple):
    data: bytes  # decompressed
    position: int  # bytes of the file on the disk read so far


class FileCheck(NamedTuple):
    """What reading a file once has shown."""

    found: bool  # the mark between documents that was looked for
    text_bytes: int  # of text in UTF-8; of .jsonl and .json, all bytes


def encoding_of(head: bytes, given: str) -> str:
    """The encoding of a file that begins with these bytes; `given` is --encoding."""
    for bom, encoding in BOMS:
        if head.startswith(bom):
            return encoding
    name = codecs.lookup(given).name
    # Without a mark: Python's own utf-16 and utf-32 would insist on one
    return {"utf-16": "utf-16-le", "utf-32": "utf-32-le"}.get(name, name)


def as_utf8(blocks: Iterable[Block], given: str) -> Iterator[Block]:
    """The blocks in UTF-8 (its byte-order mark stays). An invalid sequence of another encoding becomes byte 0xFF."""
    decoder = None
    for number, block in enumerate(blocks):
        if number == 0:
            encoding = encoding_of(block.data, given)
            decoder = None if encoding.startswith("utf-8") else codecs.getincrementaldecoder(encoding)("mark")
        if decoder:
            block = Block(decoder.decode(block.data).encode("utf-8", "mark"), block.position)
        yield block
    if decoder and (rest := decoder.decode(b"", final=True)):
        yield Block(rest.encode("utf-8", "mark"), block.position)


@dataclass
class Counts:
    """Statistics of a file's bytes, read as UTF-8."""

    bytes: int = 0
    characters: int = 0
    beyond_ascii: int = 0  # valid characters that are not ASCII
    invalid: int = 0  # bytes that belong to no character
    nul: int = 0
    long_nul_run: bool = False
    lines: int = 0
    first_invalid: str = ""
    first_nul: str = ""

    def add(self, data: bytes, text: str) -> None:
        """Add a block; `text` is `data` decoded, with invalid bytes as surrogates."""
        invalid = INVALID.findall(text)
        if invalid and not self.first_invalid:
            self.first_invalid = self.place(text[: INVALID.search(text).start()])
        if not self.first_nul and (nul := text.find("\0")) >= 0:
            self.first_nul = self.place(text[:nul])
        self.bytes += len(data)
        self.characters += len(text)
        self.beyond_ascii += len(text) - len(text.encode("ascii", "ignore")) - len(invalid)
        self.invalid += len(invalid)
        self.nul += data.count(0)
        self.long_nul_run = self.long_nul_run or LONG_NUL_RUN in data
        self.lines += text.count("\n")

    def place(self, before: str) -> str:
        """The place in the file after `before`, the beginning of a block. Counted in UTF-8, whatever the encoding."""
        position = self.bytes + len(before.encode("utf-8", "surrogateescape"))
        return f"at byte {position:,}, in line {self.lines + before.count(chr(10)) + 1:,}"

    @property
    def is_other_encoding(self) -> bool:
        """Whether most of the text beyond ASCII is invalid, and that is more than a flaw or two."""
        many = self.invalid >= 10 or (self.invalid >= 3 and 200 * self.invalid >= self.characters)
        return many and self.invalid > self.beyond_ascii

    @property
    def is_full_of_nul(self) -> bool:
        return self.long_nul_run or 10 * self.nul > self.bytes


def count(blocks: Iterable[Block]) -> Counts:
    counts, decoder = Counts(), codecs.getincrementaldecoder("utf-8")("surrogateescape")
    for block in blocks:
        counts.add(block.data, decoder.decode(block.data))
    counts.add(b"", decoder.decode(b"", final=True))
    return counts


def check_text(name: str, blocks: Callable[[], Iterator[Block]], given: str, wanted: bytes) -> FileCheck:
    """Whether the file holds `wanted`, and the size of its text. `blocks()` reads it, decompressed.

    Raises:
        UserError: it is not text in its encoding.
    """
    strict, suspect, found, end = codecs.getincrementaldecoder("utf-8")("strict"), False, False, b""
    size = 0
    for block in as_utf8(blocks(), given):
        size += len(block.data)
        found = found or wanted in end + block.data
        end = block.data[-len(wanted) :]
        suspect = suspect or LONG_NUL_RUN in block.data or 20 * block.data.count(0) > len(block.data)
        try:
            strict.decode(block.data)
        except UnicodeDecodeError:
            suspect = True
            strict.reset()
    suspect = suspect or bool(strict.getstate()[0])  # the last character is incomplete
    if suspect or not codecs.lookup(given).name.startswith("utf-8"):
        refuse_other_encoding(name, blocks, given)
    return FileCheck(found, size)


def refuse_other_encoding(name: str, blocks: Callable[[], Iterator[Block]], given: str) -> None:
    head = next(blocks(), Block(b"", 0)).data[:SAMPLE_BYTES]
    encoding, counts = encoding_of(head, given), count(as_utf8(blocks(), given))
    if counts.is_full_of_nul:
        raise UserError(
            f"{name}: is not {encoding} text, or damaged ({100 * counts.nul / counts.bytes:.3g}% of its bytes are NUL, the first "
            f"{counts.first_nul}); give its --encoding{suggestion(head)}, or leave the file out"
        )
    if counts.is_other_encoding:
        raise UserError(
            f"{name}: is not {encoding} text ({100 * counts.invalid / counts.characters:.3g}% of its characters are "
            f"invalid, the first {counts.first_invalid}); give its --encoding{suggestion(head)}, or convert it to UTF-8"
        )
    if not encoding.startswith(("utf", "ascii")):
        unconverted = count(blocks())
        if unconverted.invalid == 0 and unconverted.beyond_ascii >= 10:
            raise UserError(
                f"{name}: is UTF-8, but --encoding is {given}; if other files need that, convert them to UTF-8 and leave "
                "--encoding out"
            )


def suggestion(head: bytes) -> str:
    """` (perhaps utf-16-le)`, or nothing. Only for messages: a guess must not decide what is read."""
    if head.count(0) > 0.8 * len(head):  # UTF-32 has three in four
        return ""
    even, odd = head[::2].count(0), head[1::2].count(0)
    if max(even, odd) > len(head) // 8:
        wide = min(even, odd) > len(head) // 8
        name = ("utf-32" if wide else "utf-16") + ("-le" if odd >= even else "-be")
        return f" (perhaps {name})"
    from charset_normalizer import from_bytes  # which comes with requests, as tiktoken needs it

    best = from_bytes(head).best()
    if best is None or best.encoding in ("utf_8", "ascii"):
        return ""
    western = best.encoding in WESTERN and "cp1252 or " * (best.encoding != "cp1252")
    return f" (perhaps {western or ''}{best.encoding})"
