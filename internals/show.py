"""`prepare_data.py --show`: the text around a token of a prepared folder."""

from pathlib import Path

import numpy as np
import tiktoken

from internals.screen import printable
from internals.shards import read_meta, read_tokenizer
from internals.start import UserError
from internals.tokenizer import load_tokenizer
from internals.windows import TokenStream

AROUND = 60  # tokens shown on each side
TITLE = 40  # tokens of an article that are searched for its first line
BLOCK = 1 << 24  # tokens searched at once


def show_tokens(data_dir: Path, numbers: list[int]) -> None:
    """Print the text around these tokens of the training split, and which article it is part of."""
    stream = TokenStream.open(data_dir, "train")
    encoding = load_tokenizer(read_tokenizer(data_dir, read_meta(data_dir)))
    for number in numbers:
        if not 0 <= number < len(stream):
            raise UserError(
                f"--show {number}: {data_dir} has training tokens 0 to {len(stream) - 1:,}; give one of them"
            )
    for number in numbers:
        article, start = find_article(stream, number, encoding.eot_token)
        head = stream.read(start, min(TITLE, len(stream) - start))
        ends = np.flatnonzero(head == encoding.eot_token)
        title = decode(encoding, head[: ends[0]] if len(ends) else head).strip().split("\n")[0]
        first, last = max(0, number - AROUND), min(len(stream), number + AROUND + 1)
        parts = np.split(stream.read(first, last - first), [number - first, number - first + 1])
        before, token, after = (decode(encoding, part) for part in parts)
        print(f"training token {number:,} of {len(stream):,}, in article {article:,}: {title}")
        print(f"{before}[[{token}]]{after}\n")


def find_article(stream: TokenStream, number: int, end: int) -> tuple[int, int]:
    """The article that a token is in, counted from 1, and the token that it begins with."""
    article, start = 1, 0
    for first in range(0, number, BLOCK):
        ends = np.flatnonzero(stream.read(first, min(BLOCK, number - first)) == end)
        article += len(ends)
        start = first + int(ends[-1]) + 1 if len(ends) else start
    return article, start


def decode(encoding: tiktoken.Encoding, tokens: np.ndarray) -> str:
    """The text of these tokens, for a screen."""
    try:
        return printable(encoding.decode_bytes([int(token) for token in tokens]).decode("utf-8", "replace"))
    except KeyError as error:
        raise UserError(
            f"--show: the shards have token {max(tokens)}, but a vocabulary of {encoding.n_vocab:,}, so one of them is damaged; "
            "train.py --check with the same --data-dir says which"
        ) from error
