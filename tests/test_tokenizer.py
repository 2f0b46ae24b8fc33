"""internals/tokenizer.py: the tokens are those of tiktoken and GPT-2."""

import os
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tiktoken
from conftest import needs_gpt2, needs_wikipedia

from internals.start import UserError
from internals.tokenizer import load_tokenizer
from internals.tokenizer_json import GPT2_PATTERN


def test_bytes_tokenizer_is_the_bytes():
    tokenizer = load_tokenizer("bytes")
    text = "Zoë 東京 <|endoftext|>\n"
    assert tokenizer.encode_ordinary(text) == list(text.encode())
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (257, 256)


GPT2_ORIGINAL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # from its encoder.py


ALPHABET = [*"abZ'stremvld019 .,=-\n\t\r", "  ", "\n\n", "'ll", "é", "ß", "東", "ก", "ั", "e\u0301", "\u00a0", "\u2003", "\u2028",
            "\u3000", "\x85", "\x00", "½", "Ⅷ", "٣", "👩\u200d👧", "\ufeff", "\U0001d400", "\ue000", "\u0378"]  # fmt: skip


def test_the_pattern_cuts_like_gpt2s_own():
    rng = random.Random(0)
    pairs = [bytes([a, b]) for a in range(256) for b in range(256)]
    rng.shuffle(pairs)  # merges in a random order: nearly any other cut would change the tokens
    ranks = {token: rank for rank, token in enumerate([*(bytes([b]) for b in range(256)), *pairs])}
    ours, original = (
        tiktoken.Encoding("pairs", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        for pattern in (GPT2_PATTERN, GPT2_ORIGINAL)
    )
    for length in range(1, 200):
        for _ in range(100):
            text = "".join(rng.choices(ALPHABET, k=length))
            assert ours.encode_ordinary(text) == original.encode_ordinary(text), ascii(text)


@needs_gpt2
@needs_wikipedia
def test_gpt2_tokenizer_is_tiktokens_own():
    ours, original = load_tokenizer("gpt2"), tiktoken.get_encoding("r50k_base")  # the ranks of "gpt2" in one file
    assert (ours.n_vocab, ours.eot_token) == (original.n_vocab, original.eot_token) == (50257, 50256)
    for path in sorted(Path(os.environ["WIKIPEDIA_SAMPLE_DIR"]).glob("*.parquet")):
        for text in pq.read_table(path, columns=["text"])["text"].to_pylist()[:2000]:
            assert ours.encode_ordinary(text) == original.encode_ordinary(text)


def test_unknown_tokenizer():
    with pytest.raises(UserError, match="gpt3"):
        load_tokenizer("gpt3")
