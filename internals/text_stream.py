"""Tokens as they come -> text that can be printed."""

import codecs
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence

import tiktoken

from internals.start import UserError


class TextStream:
    """Turns one sample's tokens into text as they come: never half a character, never a part of a stop text.

    A character may be spread over several tokens, so bytes wait here until it is whole. What may be the beginning of a
    stop text waits until it is clear whether it is.
    """

    def __init__(self, tokenizer: tiktoken.Encoding, stop: Sequence[str] = (), ignore_eot: bool = False):
        self.tokenizer, self.stop, self.ignore_eot = tokenizer, stop, ignore_eot
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.pieces: list[str] = []  # what may be printed
        self.held = ""  # what may still become a stop text
        self.tokens = 0  # taken so far, end-of-text and those of a stop text included
        self.begin, self.seconds = time.perf_counter(), 0.0  # how long it took, once it has ended
        self.ended = False

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def push(self, token: int) -> bool:
        """Take one more token; True where the text ends with it: end-of-text, or a stop text, which is left out."""
        self.tokens += 1
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
        """Nothing more comes: what waited is text (bytes that make no character become U+FFFD)."""
        if not self.ended:
            self.pieces.append(self.held + self.decoder.decode(b"", final=True))
            self.held, self.ended = "", True
            self.seconds = time.perf_counter() - self.begin
        return True


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def write(text: str) -> None:
    """Text to stdout, at once. A reader that has gone (`| head`) ends the program without a word.

    Raises:
        UserError: it cannot be written (a full disk).
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try again as it ends
        if isinstance(error, BrokenPipeError):
            sys.exit(0)
        raise UserError(f"the text could not be written to stdout ({error.strerror})") from error


def print_text(prompt: str, steps: Iterable[list[TextStream]]) -> None:
    """Prompt and continuation of each sample, a blank line between samples. The first that has not ended is printed as
    it comes; those behind it are computed with it and wait for their turn."""
    current, printed, before = 0, 0, prompt  # the sample being printed, how many of its pieces are, what comes first
    for streams in steps:
        while current < len(streams):
            stream = streams[current]
            after = "\n" if stream.ended else ""
            if text := before + "".join(stream.pieces[printed:]) + after:
                write(text)
            printed, before = len(stream.pieces), ""
            if not stream.ended:
                break
            current, printed, before = current + 1, 0, "\n" + prompt


def print_json(prompt: str, seed: int, steps: Iterable[list[TextStream]]) -> None:
    """A line for each sample, as soon as it and those before it have ended."""
    current = 0
    for streams in steps:
        while current < len(streams) and streams[current].ended:
            stream = streams[current]
            row = {
                "prompt": prompt,
                "text": stream.text,
                "tokens": stream.tokens,
                "seed": seed,
                "seconds": round(stream.seconds, 4),
                "tokens_per_second": round(stream.tokens / stream.seconds, 1),
            }
            write(json.dumps(row, ensure_ascii=False) + "\n")
            current += 1
