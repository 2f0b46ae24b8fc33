"""internals/tokenizer.py: the tokens are those of tiktoken and GPT-2, however texts are joined or cut."""

import os
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiktoken
from articles import as_text, make_articles
from conftest import needs_gpt2, needs_wikipedia

from internals.bulk_encoding import PIECE, encode
from internals.start import UserError
from internals.tokenizer import load_tokenizer
from internals.tokenizer_json import GPT2_PATTERN


def test_bytes_tokenizer_is_the_bytes():
    tokenizer = load_tokenizer("bytes")
    text = "Zoë 東京 <|endoftext|>\n"
    assert tokenizer.encode_ordinary(text) == list(text.encode())
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (257, 256)


GPT2_ORIGINAL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # of its encoder.py


ALPHABET = [*"abZ'stremvld019 .,=-\n\t\r", "  ", "\n\n", "'ll", "é", "ß", "東", "ก", "ั", "e\u0301", "\u00a0", "\u2003", "\u2028",
            "\u3000", "\x85", "\x00", "½", "Ⅷ", "٣", "👩\u200d👧", "\ufeff", "\U0001d400", "\ue000", "\u0378"]  # fmt: skip


def test_the_pattern_cuts_like_gpt2s_own():
    rng = random.Random(0)
    pairs = [bytes([a, b]) for a in range(256) for b in range(256)]
    rng.shuffle(pairs)  # merges in a random order: nearly every other cut would give other tokens
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


@needs_gpt2
def test_cutting_long_texts_does_not_change_their_tokens():
    text = "\n\n".join(as_text(row) for row in make_articles(400)) + "  \n \n x  y\tz " * 2000
    assert len(text) > 5 * PIECE
    encoding = load_tokenizer("gpt2")
    got, lengths = encode(encoding, [text])
    assert got.tolist() == [*encoding.encode_ordinary(text), encoding.eot_token]
    assert lengths.tolist() == [len(got)]


@pytest.mark.parametrize("tokenizer", ["bytes", pytest.param("gpt2", marks=needs_gpt2)])
@pytest.mark.parametrize("odd", [None, "one <|endoftext|> two", "<|endoftext|>", "long", "<|endof"])
def test_many_texts_in_one_call_have_the_tokens_of_each_alone(tokenizer, odd):
    texts = ["x", " ends in blanks  \n ", "\n\nbegins so", "text|>", "'s", "東京", *(map(as_text, make_articles(20)))]
    if odd is not None:
        texts.insert(7, " word" * PIECE if odd == "long" else odd)
    encoding = load_tokenizer(tokenizer)
    want = [[*encoding.encode_ordinary(text), encoding.eot_token] for text in texts]
    tokens, lengths = encode(encoding, texts)
    assert tokens.dtype == np.uint16
    assert [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])] == want
    assert [len(array) for array in encode(encoding, [])] == [0, 0]
