"""data.py: the shard format, and the order in which training and evaluation visit it."""

import hashlib
import json
import os
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiktoken
from conftest import needs_gpt2, needs_wikipedia

from internals.files import write_json
from internals.shards import ShardWriter, read_meta, read_shard, shard_header
from internals.start import UserError
from internals.tokenizer import GPT2_PATTERN, load_tokenizer
from internals.windows import TokenStream, TrainingWindows, ValidationWindows


def write_shards(folder, split, tokens, shard_tokens=100):
    writer = ShardWriter(folder, split, shard_tokens)
    for start in range(0, len(tokens), 37):  # pieces that fit no shard's border
        writer.write(tokens[start : start + 37])
    return writer.finish()


def write_folder(folder, train, val, shard_tokens=100):
    splits = {}
    for split, tokens in (("train", train), ("val", val)):
        shards = write_shards(folder, split, tokens, shard_tokens)
        splits[split] = {"tokens": len(tokens), "bytes": len(tokens), "articles": 1, "shards": shards}
    write_json(folder / "meta.json", {"format": 1, "tokenizer": "bytes", "vocab_size": 257, "splits": splits})


def random_tokens(count, seed=0):
    return np.random.default_rng(seed).integers(0, 2**16, count).astype(np.uint16)


# Tokenizers


def test_bytes_tokenizer_is_the_bytes():
    tokenizer = load_tokenizer("bytes")
    text = "Zoë 東京 <|endoftext|>\n"
    assert tokenizer.encode_ordinary(text) == list(text.encode())
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (257, 256)


GPT2_ORIGINAL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # of its encoder.py
ALPHABET = [*"abZ'stremvld019 .,=-\n\t\r", "  ", "\n\n", "'ll", "é", "ß", "東", "ก", "ั", "e\u0301", "\u00a0", "\u2003", "\u2028",
            "\u3000", "\x85", "\x00", "½", "Ⅷ", "٣", "👩\u200d👧", "\ufeff", "\U0001d400", "\ue000", "\u0378"]  # fmt: skip


def test_the_pattern_cuts_as_gpt2s_own():
    rng = random.Random(0)
    pairs = [bytes([a, b]) for a in range(256) for b in range(256)]
    rng.shuffle(pairs)  # merges in any order: hardly a cut can be moved without other tokens
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
    ours, original = load_tokenizer("gpt2"), tiktoken.get_encoding("r50k_base")  # the ranks of "gpt2", in one file
    assert (ours.n_vocab, ours.eot_token) == (original.n_vocab, original.eot_token) == (50257, 50256)
    for path in sorted(Path(os.environ["WIKIPEDIA_SAMPLE_DIR"]).glob("*.parquet")):
        for text in pq.read_table(path, columns=["text"])["text"].to_pylist()[:2000]:
            assert ours.encode_ordinary(text) == original.encode_ordinary(text)


def test_unknown_tokenizer():
    with pytest.raises(UserError, match="gpt3"):
        load_tokenizer("gpt3")


# Shards


def test_shards_have_the_layout_of_llm_c(tmp_path):
    tokens = random_tokens(250)
    entries = write_shards(tmp_path, "train", tokens)
    assert [(e["file"], e["tokens"]) for e in entries] == [
        ("train_000000.bin", 100), ("train_000001.bin", 100), ("train_000002.bin", 50),
    ]  # fmt: skip
    got = []
    for entry in entries:
        raw = (tmp_path / entry["file"]).read_bytes()
        header = [int.from_bytes(raw[i : i + 4], "little", signed=True) for i in range(0, 1024, 4)]
        assert header == [20240520, 1, entry["tokens"], *[0] * 253]
        got += [int.from_bytes(raw[i : i + 2], "little") for i in range(1024, len(raw), 2)]
        assert entry["sha256"] == hashlib.sha256(raw).hexdigest()
    assert got == tokens.tolist()
    assert sorted(p.name for p in tmp_path.iterdir()) == [e["file"] for e in entries]


@pytest.mark.parametrize("kept", [0, 1, 99, 100, 101, 200, 249])
def test_a_writer_goes_on_from_any_length(tmp_path, kept):
    tokens = random_tokens(250)
    writer = ShardWriter(tmp_path, "train", 100)
    writer.write(tokens)
    writer.close()
    writer = ShardWriter(tmp_path, "train", 100, tokens=kept)
    writer.write(tokens[kept:])
    writer.finish()
    stream = TokenStream([read_shard(path) for path in sorted(tmp_path.glob("*.bin"))])
    assert np.array_equal(stream.read(0, 250), tokens)


def test_a_writer_goes_on_after_a_stop_while_it_finished(tmp_path):
    tokens = random_tokens(250)
    entries = write_shards(tmp_path, "train", tokens)
    (tmp_path / "train_000001.bin").rename(tmp_path / "train_000001.bin.partial")
    assert ShardWriter(tmp_path, "train", 100, tokens=250).finish() == entries


def test_a_writer_refuses_files_that_lost_something(tmp_path):
    writer = ShardWriter(tmp_path, "train", 100)
    writer.write(random_tokens(150))
    writer.close()
    with pytest.raises(UserError, match=r"train_000001\.bin"):
        ShardWriter(tmp_path, "train", 100, tokens=151)


def test_the_tail_of_a_split(tmp_path):
    tokens = random_tokens(350)
    writer = ShardWriter(tmp_path, "train", 100)
    writer.write(tokens)
    for length in (1, 50, 51, 149, 150, 151, 350):
        assert np.array_equal(writer.tail(length), tokens[-length:])


@pytest.mark.parametrize("name", ["cut", "long", "empty", "other", "missing", "unfinished"])
def test_a_file_that_is_no_whole_shard_is_refused(tmp_path, name):
    path = tmp_path / "train_000000.bin"
    whole = shard_header(100) + bytes(200)
    content = {
        "cut": whole[:-1], "long": whole + b"\0\0", "empty": b"", "other": b"x" * 2000, "unfinished": bytes(1024) + bytes(200),
    }  # fmt: skip
    if name != "missing":
        path.write_bytes(content[name])
    with pytest.raises(UserError, match=r"train_000000\.bin"):
        read_shard(path)
    path.write_bytes(whole)
    assert len(read_shard(path)) == 100


# meta.json


def test_meta_of_a_finished_folder(tmp_path):
    write_folder(tmp_path, random_tokens(250), random_tokens(30))
    assert read_meta(tmp_path)["splits"]["train"]["tokens"] == 250
    assert len(TokenStream.open(tmp_path, "train")) == 250
    assert len(TokenStream.open(tmp_path, "val")) == 30


def test_folders_that_are_not_finished(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_meta(tmp_path / "none")
    with pytest.raises(UserError, match="no prepared data"):
        read_meta(tmp_path)
    ShardWriter(tmp_path, "train", 100).write(random_tokens(10))
    with pytest.raises(UserError, match="not finished"):
        read_meta(tmp_path)
    for content in ("{", "[]", "{}", '{"format": 99}'):
        (tmp_path / "meta.json").write_text(content)
        with pytest.raises(UserError, match=r"meta\.json"):
            read_meta(tmp_path)


def test_a_shard_of_another_length_than_meta_says_is_refused(tmp_path):
    write_folder(tmp_path, random_tokens(250), random_tokens(30))
    (tmp_path / "train_000001.bin").write_bytes(shard_header(99) + bytes(198))
    with pytest.raises(UserError, match=r"train_000001\.bin"):
        TokenStream.open(tmp_path, "train")


def test_json_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "meta.json"
    write_json(path, {"a": "東京"})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "東京"}


# Reading and the order of windows


def test_a_stream_reads_across_shards(tmp_path):
    tokens = random_tokens(250)
    stream = TokenStream([tokens[:100], tokens[100:200], tokens[200:]])
    rng = np.random.default_rng(0)
    for _ in range(200):
        start, end = sorted(rng.integers(0, 251, 2))
        if end > start:
            assert np.array_equal(stream.read(start, end - start), tokens[start:end])


def test_every_epoch_visits_every_window_once():
    stream = TokenStream([np.arange(1000, dtype=np.uint16)])
    windows = TrainingWindows(stream, block_size=16, seed=7)
    orders = []
    for epoch in range(3):
        numbers = range(epoch * windows.per_epoch, (epoch + 1) * windows.per_epoch)
        starts = [windows.start(n) for n in numbers]
        offset = min(starts)
        assert 0 <= offset < 16
        assert sorted(starts) == list(range(offset, offset + 16 * windows.per_epoch, 16))
        assert max(starts) + 17 <= 1000
        orders.append(starts)
    assert orders[0] != orders[1] != orders[2]
    assert len({min(starts) for starts in orders}) > 1


def test_the_order_is_a_pure_function_of_seed_and_number():
    stream = TokenStream([random_tokens(5000)])
    all_of_them = TrainingWindows(stream, 16, seed=1).batch(range(700))
    for ranks in (2, 4):  # 700 windows are more than two epochs; any cut and any order of asking gives the same
        for rank in reversed(range(ranks)):
            windows = TrainingWindows(stream, 16, seed=1)
            assert np.array_equal(windows.batch(range(rank, 700, ranks)), all_of_them[rank::ranks])
    assert not np.array_equal(TrainingWindows(stream, 16, seed=2).batch(range(20)), all_of_them[:20])


def test_a_window_is_its_inputs_and_targets():
    stream = TokenStream([np.arange(200, dtype=np.uint16)])
    batch = TrainingWindows(stream, 16, seed=0).batch(range(5))
    assert batch.shape == (5, 17) and batch.dtype == np.int64
    assert (np.diff(batch, axis=1) == 1).all()


def test_validation_windows():
    stream = TokenStream([np.arange(1000, dtype=np.uint16)])
    everything = ValidationWindows(stream, 16, eval_tokens=10_000)
    assert len(everything) == (1000 - 1) // 16
    assert np.array_equal(everything.batch(0, 62)[:, :-1].ravel(), np.arange(62 * 16))
    some = ValidationWindows(stream, 16, eval_tokens=160)
    batch = some.batch(0, len(some))
    assert batch.shape == (10, 17)
    assert batch[0, 0] == 0 and batch[-1, 0] > 800  # all through the split, not its beginning alone
    assert np.array_equal(np.concatenate([some.batch(0, 3), some.batch(3, 10)]), batch)


def test_a_split_shorter_than_a_window_is_refused():
    with pytest.raises(UserError, match="--block-size"):
        TrainingWindows(TokenStream([random_tokens(16)]), 16, seed=0)
    with pytest.raises(UserError, match="--val-fraction"):
        ValidationWindows(TokenStream([random_tokens(16)]), 16, eval_tokens=100)
