"""Tokens to text: characters and stop texts spread over several tokens, and samples printed while they grow."""

import codecs
import json
import re
import sys
import time
from collections.abc import Iterable, Sequence

import tiktoken

from internals.screen import printable
from internals.start import UserError, is_closed_pipe, silence


class ReaderGone(SystemExit):
    """The reader of stdout has gone (`| head`). Unless this is caught, the command ends silently with status 0."""


class TextStream:
    """The text of one sample while its tokens arrive. It never shows half a character or a part of a stop text.

    A character may need several tokens: its first bytes wait in `decoder`. A possible beginning of a stop text waits in
    `held`.
    """

    def __init__(self, tokenizer: tiktoken.Encoding, stop: Sequence[str] = (), ignore_eot: bool = False):
        self.tokenizer, self.stop, self.ignore_eot = tokenizer, stop, ignore_eot
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.pieces: list[str] = []  # the text so far
        self.held = ""
        self.ids: list[int] = []  # the tokens received, including end-of-text and those of a stop text
        self.begin, self.seconds = time.perf_counter(), 0.0  # duration, set at the end
        self.ended = False

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def push(self, token: int) -> bool:
        """Add a token. Returns True if the text ends here: at end-of-text or before a stop text."""
        self.ids.append(token)
        if token == self.tokenizer.eot_token and not self.ignore_eot:
            return self.end()
        self.held += self.decoder.decode(self.tokenizer.decode_single_token_bytes(token))
        if places := [place for text in self.stop if (place := self.held.find(text)) >= 0]:
            self.held = self.held[: min(places)]
            self.decoder.reset()
            return self.end()
        wait = max((overlap(self.held, text) for text in self.stop), default=0)
        self.pieces.append(self.held[: len(self.held) - wait])
        self.held = self.held[len(self.held) - wait :]
        return False

    def end(self) -> bool:
        """End the text: what was held belongs to it. Bytes of an unfinished character become U+FFFD. Returns True."""
        if not self.ended:
            self.pieces.append(self.held + self.decoder.decode(b"", final=True))
            self.held, self.ended = "", True
            self.seconds = time.perf_counter() - self.begin
        return True


def overlap(text: str, stop: str) -> int:
    """The most characters that end `text` and begin `stop`: `overlap("a ban", "banana") -> 3`."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)


def print_text(prompt: str, steps: Iterable[list[TextStream]]) -> None:
    """Print prompt and continuation of each sample, with a blank line between samples.

    All samples grow together. The first one that has not ended is printed as it grows; later ones wait for their turn.
    A pipe or a file gets the exact text. A terminal, which would obey control characters, gets what `printable` makes
    of them.
    """
    shown = printable if sys.stdout.isatty() else str
    current, printed, before = 0, 0, prompt  # the sample in turn, its pieces already printed, the text due before them
    for streams in steps:
        while current < len(streams):
            stream = streams[current]
            if text := before + "".join(stream.pieces[printed:]) + "\n" * stream.ended:
                write(shown(text))
            printed, before = len(stream.pieces), ""
            if not stream.ended:
                break
            current, printed, before = current + 1, 0, "\n" + prompt


def print_json(prompt: str, seed: int, steps: Iterable[list[TextStream]]) -> None:
    """Print one line of JSON per sample, as soon as it and all earlier ones have ended."""
    current = 0
    for streams in steps:
        while current < len(streams) and streams[current].ended:
            stream = streams[current]
            row = {
                "prompt": prompt,
                "text": stream.text,
                "tokens": len(stream.ids),
                "seed": seed,
                "seconds": round(stream.seconds, 4),
                "tokens_per_second": round(len(stream.ids) / max(stream.seconds, 1e-9), 1),
            }
            line = json.dumps(row, ensure_ascii=False)
            # JSON leaves these as they are, but a terminal would obey them
            write(re.sub("[\x7f-\x9f]", lambda match: f"\\u{ord(match[0]):04x}", line) + "\n")
            current += 1


def write(text: str) -> None:
    """Write to stdout at once. Raises `ReaderGone` if nobody reads it; later text is then dropped."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        silence(sys.stdout)
        if is_closed_pipe(error):
            raise ReaderGone from error
        raise UserError(f"the text could not be written to stdout ({error.strerror})") from error
