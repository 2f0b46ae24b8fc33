"""Articles to tokens: what the worker threads do."""

import dataclasses
import hashlib
from dataclasses import dataclass
from itertools import islice

import numpy as np
import tiktoken

from internals.bulk_encoding import Texts, bulk_encoder, encode
from internals.encodings import INVALID
from internals.reader import Chunk, is_utf8
from internals.tokenizer import cut_tokens
from internals.tokenizer_json import END_OF_TEXT

FEW_IDS = 10  # with fewer different ids than this, they explain why a split misses its share


@dataclass(frozen=True)
class Tokens:
    """A tokenized chunk."""

    tokens: np.ndarray  # (N,) uint16, of all articles in their order
    lengths: np.ndarray  # (articles,) int64, tokens of each
    text_bytes: np.ndarray  # (articles,) int64, of each text in UTF-8
    val: np.ndarray  # (articles,) bool: in the validation split
    ends: bool  # False: the next chunk continues the article
    empty: int  # articles without text, left out
    empty_before: np.ndarray  # (articles,) int64, empty articles left out before each
    characters: int  # in all texts
    replaced: np.ndarray  # (articles,) int64, characters in each that replace an invalid byte
    ids: frozenset[bytes]  # the ids or texts that decided the splits, cut short, at most FEW_IDS

    def up_to(self, room: int, limit: int, encoding: tiktoken.Encoding) -> tuple["Tokens", bool]:
        """The articles up to the one that reaches `room` tokens, and whether that one is cut. It stays whole if it exceeds
        `room` by at most `limit`. A document that continues in the next chunk is always cut.

        `ids` are those of the chunk: they are for messages only.
        """
        ends = np.cumsum(self.lengths)
        last = int(np.searchsorted(ends, room))
        if self.ends and ends[last] - room <= limit:
            kept, is_cut = self.tokens[: ends[last]], False
        else:
            start = ends[last] - self.lengths[last]
            text = cut_tokens(encoding, self.tokens[start : ends[last]], room - start - 1)
            end = np.array([encoding.eot_token], np.uint16)
            kept, is_cut = np.concatenate([self.tokens[:start], text, end]), True
        of_articles = (self.lengths, self.text_bytes, self.replaced)
        lengths, text_bytes, replaced = (numbers[: last + 1].copy() for numbers in of_articles)
        if is_cut:
            data = encoding.decode_bytes(text.tolist())
            lengths[last], text_bytes[last] = len(text) + 1, len(data)
            replaced[last] = min(replaced[last], data.count("\ufffd".encode()))
        new = dataclasses.replace(
            self, tokens=kept, lengths=lengths, text_bytes=text_bytes, val=self.val[: last + 1], ends=True,
            empty=int(self.empty_before[last]), empty_before=self.empty_before[: last + 1],
            characters=count_characters(encoding.decode_bytes(kept[kept != encoding.eot_token].tolist())),
            replaced=replaced,
        )  # fmt: skip
        return new, is_cut


def tokenize(chunk: Chunk, tokenizer: str, val_fraction: float) -> Tokens:
    """An article becomes its title, a blank line, its text (without a title: its text), and end-of-text."""
    articles = list(chunk.articles())
    whole = chunk.starts and chunk.ends
    numbers = [number for number, article in enumerate(articles) if not (whole and article.is_blank)]
    kept = [articles[number] for number in numbers]
    texts, replaced = Texts([(article.heading, article.text) for article in kept]), np.zeros(len(kept), np.int64)
    if not is_utf8(texts.data):
        texts, replaced = repair(texts)
    keys = [text if article.id is None else article.id for article, text in zip(kept, texts, strict=True)]
    tokens, lengths = encode(bulk_encoder(tokenizer), texts)
    if not chunk.ends:  # the document continues: no end-of-text yet
        tokens, lengths = tokens[:-1], lengths - 1
    return Tokens(
        tokens=tokens,
        lengths=lengths,
        text_bytes=texts.sizes,
        val=np.array([is_held_out(key, val_fraction) for key in keys], bool),
        ends=chunk.ends,
        empty=len(articles) - len(kept),
        empty_before=np.array(numbers, np.int64) - np.arange(len(kept)),
        characters=count_characters(texts.data) - len(texts) * len(END_OF_TEXT),
        replaced=replaced,
        ids=frozenset(map(shortened, islice(dict.fromkeys(keys), FEW_IDS))),
    )


def shortened(key: bytes) -> bytes:
    """An id or a text in at most 40 bytes, for a message. Different ones stay different."""
    if len(key) <= 40:
        return key
    whole_characters = key[:28].decode("utf-8", "ignore").encode()
    return whole_characters + b"..." + hashlib.blake2b(key, digest_size=4).hexdigest().encode()


def count_characters(text: bytes) -> int:
    starts = np.frombuffer(text, np.int8) >= -64  # all bytes but 10xxxxxx, which continue a character
    return int(np.count_nonzero(starts))


def repair(texts: Texts) -> tuple[Texts, np.ndarray]:
    """Replace each invalid byte with U+FFFD. Returns the texts, and (texts,) int64, how many bytes were replaced."""
    decoded = (text.decode("utf-8", "surrogateescape") for text in texts)
    pairs = [INVALID.subn("\ufffd", text) for text in decoded]
    return Texts([(text.encode(),) for text, _ in pairs]), np.array([count for _, count in pairs], np.int64)


def is_held_out(key: bytes, val_fraction: float) -> bool:
    """A pure function of an article's id or text, so that every run on every machine splits alike."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") < val_fraction * 2**64
