"""internals/bulk_encoding.py: the tokens are tiktoken's, whichever encoder runs and however texts are joined or cut."""

import functools
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
from articles import as_text, command, files, make_articles, write_parquet
from conftest import REPO, needs_gpt2, needs_wikipedia, run_script
from test_tokenizer import ALPHABET

from internals import bulk_encoding
from internals.bulk_encoding import PIECE, GigatokenEncoder, Texts, TiktokenEncoder, bulk_encoder, encode, pieces
from internals.files import writing
from internals.start import UserError
from internals.tokenizer import load_tokenizer
from internals.tokenizer_json import END_OF_TEXT, GPT2_PATTERN, OWN_PATTERN
from internals.tokenizer_training import train_tokenizer


def can_import_gigatoken() -> bool:
    try:
        import gigatoken  # noqa: F401
    except ImportError:
        return False
    return True


needs_gigatoken = pytest.mark.skipif(
    not can_import_gigatoken(), reason="needs gigatoken: pip install -r requirements-fast.txt"
)
SAMPLE = (REPO / "sample" / "articles.jsonl").read_text(encoding="utf-8").splitlines()
ENCODERS = [
    pytest.param(TiktokenEncoder, "bytes", id="tiktoken-bytes"),
    pytest.param(TiktokenEncoder, "gpt2", id="tiktoken-gpt2", marks=needs_gpt2),
    pytest.param(TiktokenEncoder, "own", id="tiktoken-own"),
    pytest.param(GigatokenEncoder, "gpt2", id="gigatoken-gpt2", marks=[needs_gpt2, needs_gigatoken]),
    pytest.param(GigatokenEncoder, "own", id="gigatoken-own", marks=needs_gigatoken),
]


@functools.cache
def encoding_of(name: str) -> tiktoken.Encoding:
    """The encoding of that name; "own" is one that is trained here."""
    return load_tokenizer(own_tokenizer() if name == "own" else name)


@functools.cache
def own_tokenizer() -> str:
    return train_tokenizer([json.loads(row)["text"] for row in SAMPLE], 2000)


def in_utf8(texts):
    return Texts([(text.encode(),) for text in texts])


def test_texts_side_by_side():
    texts = Texts([(b"a", b"bc"), (b"",), ("é".encode(), b"")])
    assert list(texts) == [b"abc", b"", "é".encode()]
    assert texts.data == "abc<|endoftext|><|endoftext|>é<|endoftext|>".encode()
    assert [texts.joined(0, 3), texts.joined(1, 2)] == [texts.data, b"<|endoftext|>"]
    assert (len(Texts([])), Texts([]).data) == (0, b"")


@pytest.mark.parametrize("kind, tokenizer", ENCODERS)
@pytest.mark.parametrize("odd", [None, "one <|endoftext|> two", "<|endoftext|>", "long", "<|endof"])
def test_many_texts_in_one_call_have_the_tokens_of_each_alone(kind, tokenizer, odd):
    texts = ["x", " ends in blanks  \n ", "\n\nbegins so", "", "text|>", "'s", "東京", *map(as_text, make_articles(20))]
    if odd is not None:
        texts.insert(7, " word" * PIECE if odd == "long" else odd)
    encoding = encoding_of(tokenizer)
    want = [[*encoding.encode_ordinary(text), encoding.eot_token] for text in texts]
    tokens, lengths = encode(kind(encoding), in_utf8(texts))
    assert tokens.dtype == np.uint16
    assert [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])] == want
    assert [len(array) for array in encode(kind(encoding), in_utf8([]))] == [0, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Long texts


PATTERNS = {
    "GPT-2": GPT2_PATTERN,
    "GPT-4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "Qwen 3.5": OWN_PATTERN,
    "a word and its number": r"\p{L}+ \p{N}+|\s+|\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+",
    "sentences": r"[^.\n]*[.\n]|[^.\n]+",
    "blanks after words": r"\S+\s?|\s+",
}
LONG_TEXTS = {
    "articles": "\n\n".join(as_text(row) for row in make_articles(60)) + "  \n \n x  y\tz " * 300,
    "lines": "".join(f"print({n}, 'a b');\n    if x {n}: y = 100000{n}\n" for n in range(1500)),
    "Chinese": "".join(f"東京{n}年、京都。大阪" for n in range(4000)),
    "Hindi": "हिन्दी विकिपीडिया एक ज्ञानकोश है। " * 1500,
}


def pairs_encoding(pattern):
    """Byte merges in a random order, so that nearly every cut inside a piece changes the tokens."""
    pairs = [bytes([a, b]) for a in range(256) for b in range(256)]
    random.Random(0).shuffle(pairs)
    ranks = {token: rank for rank, token in enumerate([*(bytes([b]) for b in range(256)), *pairs])}
    return tiktoken.Encoding("pairs", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)})


@pytest.mark.parametrize("text", LONG_TEXTS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_pieces_have_the_tokens_of_the_whole(pattern, text, monkeypatch):
    monkeypatch.setattr(bulk_encoding, "PIECE", 3000)
    encoding, text = pairs_encoding(PATTERNS[pattern]), LONG_TEXTS[text]
    parts = list(pieces(text, encoding))
    assert "".join(parts) == text and len(parts) > 8
    assert [token for part in parts for token in encoding.encode_ordinary(part)] == encoding.encode_ordinary(text)


@needs_gpt2
def test_cutting_long_texts_does_not_change_gpt2s_tokens():
    text, encoding = "\n".join(LONG_TEXTS.values()) * 2, load_tokenizer("gpt2")
    assert len(text) > 4 * PIECE
    got, lengths = encode(TiktokenEncoder(encoding), in_utf8([text]))
    assert got.tolist() == [*encoding.encode_ordinary(text), encoding.eot_token]
    assert lengths.tolist() == [len(got)]


@needs_gpt2
@pytest.mark.parametrize(
    "text",
    [" " * 300_000, "\n" * 300_000, "a" * 300_000, "東" * 100_000, "\0" * 200_000],
    ids=lambda text: ascii(text[0]),
)
def test_a_run_without_a_place_to_cut_comes_back_exactly_and_alike(text):
    encoding = load_tokenizer("gpt2")
    tokens, _ = encode(TiktokenEncoder(encoding), in_utf8([text]))
    assert encoding.decode(tokens[:-1].tolist()) == text
    if can_import_gigatoken():
        assert encode(GigatokenEncoder(encoding), in_utf8([text])).tokens.tolist() == tokens.tolist()


# ----------------------------------------------------------------------------------------------------------------------
# gigatoken


@pytest.fixture(params=[pytest.param("gpt2", marks=needs_gpt2), "own"])
def both(request):
    """tiktoken and gigatoken, with one tokenizer."""
    return TiktokenEncoder(encoding_of(request.param)), GigatokenEncoder(encoding_of(request.param))


def assert_same(both, texts):
    want, got = (encode(encoder, in_utf8(texts)) for encoder in both)
    assert np.array_equal(got.tokens, want.tokens) and np.array_equal(got.lengths, want.lengths)


@needs_gigatoken
def test_gigatoken_gives_tiktokens_tokens_for_every_character(both):
    """Of those that are assigned, and some of the others, which no tokenizer tells apart."""
    codes = [*range(0xD800), *range(0xE000, 0x33480), *range(0xE0000, 0xE0200), *range(0x33480, 0x110000, 997)]
    characters = [chr(code) for code in codes]
    for start in range(0, len(characters), 4096):
        assert_same(both, [f"a{c}b {c} {c}1{c}.{c}  {c}{c}\n{c}" for c in characters[start : start + 4096]])


@needs_gigatoken
def test_gigatoken_gives_tiktokens_tokens_for_odd_texts(both):
    rng = random.Random(0)
    parts = [*ALPHABET, END_OF_TEXT, "<|", "|>", "<|endof", "text|>", "a" * 50, " " * 40]
    for length in range(150):
        assert_same(both, ["".join(rng.choices(parts, k=length)) for _ in range(40)])


@needs_gigatoken
@needs_wikipedia
def test_gigatoken_gives_tiktokens_tokens_for_wikipedia(both, monkeypatch):
    import pyarrow.parquet as pq

    monkeypatch.setattr(bulk_encoding, "CACHE_SECONDS", 0.05)  # so that the cache is renewed a few times
    folder = os.environ["WIKIPEDIA_SAMPLE_DIR"]
    first = both[1].fast
    for name in sorted(os.listdir(folder)):
        assert_same(both, pq.read_table(os.path.join(folder, name), columns=["text"])["text"].to_pylist()[:3000])
    assert both[1].fast is not first


class PanicException(BaseException):
    """pyo3's exception for a panic in Rust."""


class Broken:
    def encode_batch_padded(self, *args, **kwargs):
        raise PanicException


@needs_gigatoken
def test_a_panic_in_gigatoken_costs_nothing(both):
    both[1].fast = Broken()
    assert_same(both, ["one", "two"])
    assert not isinstance(both[1].fast, Broken)  # it was rebuilt


@pytest.fixture
def no_encoder_yet():
    bulk_encoder.cache_clear()
    yield
    bulk_encoder.cache_clear()


@needs_gpt2
def test_without_gigatoken(no_encoder_yet, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert bulk_encoder("bytes").summary == "encoding with tiktoken"
    encoder = bulk_encoder("gpt2")
    assert type(encoder) is TiktokenEncoder and "requirements-fast.txt" in encoder.summary
    assert (REPO / "requirements-fast.txt").exists()


@needs_gpt2
@needs_gigatoken
def test_with_gigatoken_if_it_gives_the_same_tokens(no_encoder_yet, monkeypatch):
    encoder = bulk_encoder("gpt2")
    assert type(encoder) is GigatokenEncoder and encoder.summary.startswith("encoding with gigatoken 0")
    bulk_encoder.cache_clear()
    monkeypatch.setattr(GigatokenEncoder, "joined", lambda self, data: TiktokenEncoder.joined(self, data[1:]))
    encoder = bulk_encoder("gpt2")
    assert type(encoder) is TiktokenEncoder and "gives other tokens" in encoder.summary


@needs_gigatoken
@pytest.mark.parametrize("error", [TypeError("from_tiktoken() takes 2 arguments"), PanicException("in Rust")], ids=repr)
def test_a_gigatoken_that_does_not_work_is_not_used(no_encoder_yet, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setitem(sys.modules, "gigatoken", SimpleNamespace(Tokenizer=SimpleNamespace(from_tiktoken=fail)))
    encoder = bulk_encoder(own_tokenizer())
    assert type(encoder) is TiktokenEncoder and f"does not work here ({error})" in encoder.summary


@needs_gigatoken
def test_a_full_temporary_folder_is_named(no_encoder_yet, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    words = f"^temporary folder {tempfile.gettempdir()}: cannot be written .No space left on device.; .*TMPDIR"
    with pytest.raises(UserError, match=words), writing("--data-dir"):
        bulk_encoder(own_tokenizer())


@needs_gpt2
@needs_gigatoken
def test_the_command_makes_the_same_files_with_and_without_gigatoken(tmp_path):
    for part in range(3):
        odd = [{"id": f"odd {part}", "title": "", "text": f"a {END_OF_TEXT} b" + " " * 100_000 + "東" * 70_000}]
        write_parquet(tmp_path / "in" / f"{part}.parquet", make_articles(600, seed=part) + odd)
    for name, module in (("with", "gigatoken"), ("without", "None")):
        code = f"import sys, gigatoken; sys.modules['gigatoken'] = {module}; import runpy; runpy.run_path('prepare_data.py', run_name='__main__')"
        result = run_script("-c", code, *command(tmp_path / name, tmp_path / "in", "--tokenizer", "gpt2")[1:])
        assert result.returncode == 0, result.stderr
        assert ("with gigatoken" in result.stdout) == (name == "with")
    assert files(tmp_path / "with") == files(tmp_path / "without")
