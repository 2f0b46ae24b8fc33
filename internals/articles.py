"""Articles to tokens: what the worker threads do."""

import dataclasses
import hashlib
import re
from dataclasses import dataclass

import numpy as np
import tiktoken

from internals.bulk_encoding import encode, thread_tokenizer
from internals.reader import Chunk
from internals.tokenizer import cut_tokens

FEW_IDS = 10  # different ones: fewer explain why a split misses its share


@dataclass(frozen=True)
class Tokens:
    """A tokenized chunk."""

    tokens: np.ndarray  # (N,) uint16, of all articles in their order
    lengths: np.ndarray  # (articles,) int64, tokens of each
    text_bytes: np.ndarray  # (articles,) int64, of each text in UTF-8
    val: np.ndarray  # (articles,) bool: in the validation split
    ends: bool  # False: the next chunk continues the article
    empty: int  # articles without text, left out
    repaired: int  # articles with invalid Unicode, replaced
    characters: int = 0  # of all texts
    replaced: int = 0  # of those
    ids: frozenset[bytes] = frozenset()  # what decided the splits; not all of them if they are many

    def up_to(self, room: int, limit: int, encoding: tiktoken.Encoding) -> tuple["Tokens", bool]:
        """The articles that reach `room` tokens, and whether the last one is cut: it would pass that by over `limit`."""
        ends = np.cumsum(self.lengths)
        last = int(np.searchsorted(ends, room))
        if self.ends and ends[last] - room <= limit:
            kept, is_cut = self.tokens[: ends[last]], False
        else:
            start = ends[last] - self.lengths[last]
            text = cut_tokens(encoding, self.tokens[start : ends[last]], max(0, room - start - 1))
            end = np.array([encoding.eot_token], np.uint16)
            kept, is_cut = np.concatenate([self.tokens[:start], text, end]), True
        lengths, text_bytes = self.lengths[: last + 1].copy(), self.text_bytes[: last + 1].copy()
        if is_cut:
            lengths[last], text_bytes[last] = len(text) + 1, len(encoding.decode_bytes(text.tolist()))
        new = dataclasses.replace(
            self, tokens=kept, lengths=lengths, text_bytes=text_bytes, val=self.val[: last + 1], ends=True
        )
        return new, is_cut


def tokenize(chunk: Chunk, tokenizer: str, val_fraction: float) -> Tokens:
    """An article becomes its title, a blank line, its text (without a title: its text), and end-of-text."""
    texts, text_bytes, val, ids, empty, repaired, characters, replaced = [], [], [], set(), 0, 0, 0, 0
    for article in chunk.articles():
        if chunk.starts and chunk.ends and not article.text.strip():
            empty += 1
            continue
        text = f"{article.title}\n\n{article.text}" if article.title else article.text
        try:
            data = text.encode()
        except UnicodeEncodeError:  # lone surrogates, which are not characters
            text, count = re.subn("[\ud800-\udfff]", "\ufffd", text)
            repaired, replaced = repaired + 1, replaced + count
            data = text.encode()
        texts.append(text)
        text_bytes.append(len(data))
        characters += len(text)
        key = data if article.id is None else article.id
        val.append(is_held_out(key, val_fraction))
        if len(ids) < FEW_IDS:
            ids.add(key[:40])
    tokens, lengths = encode(thread_tokenizer(tokenizer), texts)
    if not chunk.ends:  # the document continues: no end-of-text yet
        tokens, lengths = tokens[:-1], lengths - 1
    counts = (chunk.ends, empty, repaired, characters, replaced, frozenset(ids))
    return Tokens(tokens, lengths, np.array(text_bytes, np.int64), np.array(val, bool), *counts)


def is_held_out(key: bytes, val_fraction: float) -> bool:
    """A pure function of an article's id or text, so that every run on every machine splits alike."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") < val_fraction * 2**64
