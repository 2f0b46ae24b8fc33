"""A tokenizer trained on the source: the same tokens in every program and every script, from source and flags alone.

PREPARE_KILLS=50 python -m pytest tests/test_own_tokenizer.py -k kills     more kills than a test run has time for
"""

import dataclasses
import gzip
import json
import os
import random
import shutil
import unicodedata

import numpy as np
import pytest
import tokenizers
import torch
from articles import command, config, files, kill_until, make_articles, posix, texts, write_jsonl, write_parquet
from conftest import REPO, assert_user_error, needs_wikipedia, run_script
from test_export import gguf_tokenizer

import prepare_data
import train
from config import ModelConfig, PrepareConfig, TrainConfig
from internals import checkpoint, reader, tokenizer_training
from internals.articles import is_held_out
from internals.bulk_encoding import Texts, TiktokenEncoder, bulk_encoder, encode
from internals.cli import parse
from internals.files import sha256
from internals.reader import ReadOptions
from internals.shards import read_meta
from internals.start import UserError
from internals.text_files import LocalFiles
from internals.text_stream import TextStream
from internals.tokenizer import given_tokenizer, load_tokenizer, tokenizer_name
from internals.tokenizer_json import END_OF_TEXT, OWN_PATTERN, canonical, merges, own_tokenizer, to_json, vocabulary
from internals.tokenizer_training import learn_tokens, sample_texts, train_tokenizer
from model import GPT
from prepare_data import prepare

# First and last character of blocks: Latin, Greek, Cyrillic, Armenian, Hebrew, Arabic, Syriac, Thaana, Devanagari, Bengali,
# Tamil, Malayalam, Thai, Lao, Tibetan, Myanmar, Georgian, Hangul Jamo, Ethiopic, Cherokee, Khmer, Mongolian, general
# punctuation, symbols, Hiragana to Bopomofo, Han, Hangul, Arabic presentation forms, full width, old scripts, emoji.
BLOCKS = [(0x20, 0x17F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x52F), (0x530, 0x58F), (0x590, 0x5FF), (0x600, 0x6FF),
          (0x700, 0x74F), (0x780, 0x7BF), (0x900, 0x97F), (0x980, 0x9FF), (0xB80, 0xBFF), (0xD00, 0xD7F), (0xE00, 0xE7F),
          (0xE80, 0xEFF), (0xF00, 0xFFF), (0x1000, 0x109F), (0x10A0, 0x10FF), (0x1100, 0x11FF), (0x1200, 0x137F),
          (0x13A0, 0x13FF), (0x1780, 0x17FF), (0x1800, 0x18AF), (0x2000, 0x206F), (0x2070, 0x27BF), (0x3000, 0x312F),
          (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFB50, 0xFDFF), (0xFE00, 0xFFEF), (0x10300, 0x1034F), (0x1F300, 0x1FAFF)]  # fmt: skip
ODD = ["  ", "\n\n", " \n ", "\r\n", "\t", "\u00a0", "\u2003", "\u2028", "\u3000", "\x85", "\x0b", "e\u0301", "\u0301", "1887", "٣٤", "½",
       "Ⅷ", "'s", "'LL", "’s", "'", END_OF_TEXT, "<|endof", "text|>", "👩\u200d👧", "🇩🇪", "👍🏽", "\ufeff", "\u200b", "\ue000", "...\n",
       "!\n\n", "camelCase", "हिन्दी", "ที่นี่", "مُحَمَّد", "東京", "한국어"]  # fmt: skip


def odd_texts(count: int, seed: int = 0) -> list[str]:
    """Words, marks, digits and blanks of every script in every order. Unassigned characters are left out: programs
    know different versions of Unicode."""
    rng = random.Random(seed)
    blocks = [
        [chr(code) for code in range(first, last + 1) if unicodedata.category(chr(code)) not in ("Cn", "Cs")]
        for first, last in BLOCKS
    ]

    def text() -> str:
        block = rng.choice(blocks)
        parts = ["".join(rng.choices(block, k=rng.randint(1, 8))) for _ in range(rng.randint(1, 8))]
        parts += rng.choices(ODD, k=rng.randint(0, 6))
        rng.shuffle(parts)
        return rng.choice(["", " "]).join(parts)

    return [text() for _ in range(count)]


@pytest.fixture(scope="module")
def own() -> str:
    """A tokenizer.json of 3,000 tokens, trained on English and on texts like the test texts."""
    rows = (REPO / "sample" / "articles.jsonl").read_text(encoding="utf-8").splitlines()
    return train_tokenizer([*(json.loads(row)["text"] for row in rows), *odd_texts(1500, seed=1) * 2], 3000)


# ----------------------------------------------------------------------------------------------------------------------
# The same tokens everywhere


def test_the_form_of_a_tokenizer(own):
    encoding = load_tokenizer(own)
    assert (encoding.n_vocab, encoding.eot_token) == (3000, 2999)
    assert encoding.special_tokens_set == {END_OF_TEXT}
    assert {encoding.decode_single_token_bytes(i) for i in range(256)} == {bytes([byte]) for byte in range(256)}
    assert to_json(encoding) == own and tokenizer_name(own) == encoding.name
    names = vocabulary(encoding)
    results = [merge.replace(" ", "") for merge in merges(encoding)]
    assert results == [name for name, id in names.items() if 256 <= id < 2999]  # one merge makes each token, in order


def test_training_gives_the_merges_of_the_library(own):
    """tiktoken keeps only ranks; the merges recovered from them must be the trained ones."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.Tokenizer.from_str(own).pre_tokenizer
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=2999, min_frequency=2, initial_alphabet=alphabet)
    rows = (REPO / "sample" / "articles.jsonl").read_text(encoding="utf-8").splitlines()
    trained.train_from_iterator([*(json.loads(row)["text"] for row in rows), *odd_texts(1500, seed=1) * 2], trainer)
    theirs = json.loads(trained.to_str())["model"]["merges"]
    assert [" ".join(merge) for merge in theirs] == merges(load_tokenizer(own))


def test_ids_are_those_of_the_tokenizers_library(own):
    encoding, theirs = load_tokenizer(own), tokenizers.Tokenizer.from_str(own)
    some = [text.replace(END_OF_TEXT, "<|end|>") for text in odd_texts(2000)]  # the library always treats it as special
    assert len(set("".join(some))) > 5000
    got = [encoding.encode_ordinary(text) for text in some]
    assert got == [one.ids for one in theirs.encode_batch(some)]
    assert [encoding.decode(ids) for ids in got] == some == theirs.decode_batch(got, skip_special_tokens=False)
    assert [encoding.decode(encoding.encode_ordinary(text)) for text in odd_texts(500)] == odd_texts(500)
    ends = theirs.encode(f"a{END_OF_TEXT}b").ids
    assert ends == encoding.encode(f"a{END_OF_TEXT}b", allowed_special={END_OF_TEXT})
    # Every character once between letters, and a selection in more places, where it may be cut from its neighbours.
    # A newer Python than 3.11 may know more of them than the library. There, those of an old Unicode are enough.
    known = unicodedata if unicodedata.unidata_version <= "14.0.0" else unicodedata.ucd_3_2_0
    every = [chr(code) for code in range(0x110000) if known.category(chr(code)) not in ("Cn", "Cs")]
    few = [c for c in every if unicodedata.category(c) not in ("Lo", "Co") or ord(c) % 32 == 0]
    lines = [f"a{c}b" for c in every] + [
        text for c in few for text in (f" {c} ", f"1{c}\n", f"!{c}\u0301", f"\n {c}\n")
    ]
    text = "x".join(lines)  # one text, because a hundred thousand calls are slow
    assert encoding.encode_ordinary(text) == theirs.encode(text).ids


@pytest.mark.parametrize("encoder", ["tiktoken", "the fastest here"])
def test_many_texts_in_one_call(own, encoder):
    some, encoding = odd_texts(2000), load_tokenizer(own)
    encode_with = TiktokenEncoder(encoding) if encoder == "tiktoken" else bulk_encoder(own)
    tokens, lengths = encode(encode_with, Texts([(text.encode(),) for text in some]))
    parts = np.split(tokens, np.cumsum(lengths)[:-1])
    assert [part.tolist() for part in parts] == [[*encoding.encode_ordinary(text), 2999] for text in some]


def test_marks_stay_with_their_letters():
    text = "हिन्दी विकिपीडिया ที่นี่ مُحَمَّد"
    pieces = [
        piece
        for piece, _ in tokenizers.pre_tokenizers.Split(tokenizers.Regex(OWN_PATTERN), "isolated").pre_tokenize_str(
            text
        )
    ]
    assert pieces == ["हिन्दी", " विकिपीडिया", " ที่นี่", " مُحَمَّد"]


def test_a_stream_never_shows_half_a_character(own):
    text = "".join(odd_texts(50))
    encoding = load_tokenizer(own)
    stream, ids = TextStream(encoding), encoding.encode_ordinary(text)
    shown = []
    for token in ids:
        stream.push(token)
        shown.append(stream.text)
    stream.end()
    assert stream.text == text and "\ufffd" not in text
    assert all(text.startswith(part) for part in shown)
    assert len(set(shown)) < len(ids)  # some tokens end inside a character


@pytest.fixture(scope="module")
def exported(own, tmp_path_factory):
    """A random model with that tokenizer, exported as a Hugging Face folder and as GGUF."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(1)
    shape = ModelConfig(n_layer=1, n_head=2, n_embd=32, n_inner=64, block_size=64, vocab_size=3000)
    saved = {
        "format": checkpoint.FORMAT, "model": GPT(shape).state_dict(), "tokenizer": own, "iter": 1, "tokens": 1, "val_loss": 1.5,
        "config": dataclasses.asdict(TrainConfig(model=shape)),
    }  # fmt: skip
    checkpoint.save(folder / "best.pt", saved)
    for name in ("hf", "gguf"):
        if name == "gguf":
            pytest.importorskip("gguf", reason="needs the gguf package: pip install gguf")
        result = run_script(
            "export.py", "--checkpoint", folder / "best.pt", "--out-dir", folder / name, "--format", name
        )
        assert result.returncode == 0, result.stderr
    return folder


def test_transformers_gives_the_same_ids(own, exported):
    transformers = pytest.importorskip("transformers")
    encoding, some = load_tokenizer(own), odd_texts(2000)
    for theirs in (
        transformers.AutoTokenizer.from_pretrained(exported / "hf"),
        transformers.PreTrainedTokenizerFast.from_pretrained(exported / "hf"),
    ):
        got = theirs(some, split_special_tokens=True, add_special_tokens=True)["input_ids"]
        assert got == [encoding.encode_ordinary(text) for text in some]
        assert theirs.batch_decode(got) == some
        assert (theirs.eos_token_id, theirs.encode(f"a{END_OF_TEXT}")[-1]) == (2999, 2999)
    assert f"`{tokenizer_name(own)}`, 3,000 tokens" in (exported / "hf" / "README.md").read_text(encoding="utf-8")
    assert not (exported / "hf" / "merges.txt").exists()  # with it, GPT-2's own class would cut by another pattern


def test_gguf_holds_the_tokenizer(own, exported):
    """Qwen 3.5 cuts texts by the same pattern."""
    gguf = pytest.importorskip("gguf", reason="needs the gguf package: pip install gguf")
    fields = gguf_tokenizer(gguf.GGUFReader(exported / "gguf" / "model.gguf"))
    assert (fields["model"], fields["pre"]) == ("gpt2", "qwen35")
    assert fields["bos_token_id"] == fields["eos_token_id"] == 2999
    assert fields["merges"] == merges(load_tokenizer(own)) and fields["add_bos_token"] is False


def test_llama_cpp_gives_the_same_ids_and_text(own, exported):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install llama-cpp-python")
    exact = {
        "type_k": llama_cpp.GGML_TYPE_F32,
        "type_v": llama_cpp.GGML_TYPE_F32,
    }  # not float16, its default
    theirs = llama_cpp.Llama(str(exported / "gguf" / "model.gguf"), n_ctx=64, verbose=False, flash_attn=False, **exact)
    encoding = load_tokenizer(own)
    for text in odd_texts(2000):
        got = theirs.tokenize(text.encode(), add_bos=False, special=False)
        assert got == encoding.encode_ordinary(text), ascii(text)
        assert theirs.detokenize(got) == text.encode()
    model, prompt = checkpoint.load_model(exported / "best.pt")[0], encoding.encode_ordinary("हिन्दी भारत")
    wanted = []
    with torch.no_grad():
        for _ in range(20):
            wanted.append(int(model(torch.tensor([[*prompt, *wanted]]))[0, -1].argmax()))
    assert [token for token, _ in zip(theirs.generate(prompt, temp=0.0, reset=True), range(20), strict=False)] == wanted


def test_an_exported_model_opens_and_its_tokenizer_prepares_data(own, exported, tmp_path):
    result = run_script("generate.py", "--checkpoint", exported / "hf", "--prompt", "हिन्दी", "--max-new-tokens", "5")
    assert result.returncode == 0 and result.stdout.startswith("हिन्दी"), result.stderr
    assert given_tokenizer(str(exported / "hf" / "tokenizer.json")) == own
    transformers = pytest.importorskip("transformers")
    transformers.AutoTokenizer.from_pretrained(exported / "hf").save_pretrained(tmp_path)
    assert given_tokenizer(str(tmp_path / "tokenizer.json")) == own  # transformers saves it in another form


def test_another_tokenizer_is_not_taken_for_one_of_ours(own, tmp_path):
    value = json.loads(own)
    gpt2s = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    swapped = [value["model"]["merges"][n] for n in (1, 0, *range(2, len(value["model"]["merges"])))]
    for changes in (
        {"pre_tokenizer": gpt2s},
        {"normalizer": {"type": "NFC"}},
        {"model": {**value["model"], "merges": swapped}},
        {"added_tokens": []},
        {"model": {"type": "WordPiece"}},
    ):
        with pytest.raises(UserError, match=r"is not a tokenizer that prepare_data\.py trained"):
            canonical(json.dumps(value | changes), "x")
    for text in ("", "{}", "[]", "{"):
        with pytest.raises(UserError, match="is not a tokenizer"):
            canonical(text, "x")
    (tmp_path / "latin.json").write_bytes("é".encode("latin-1"))
    for name, word in (
        ("latin.json", "is not a tokenizer"),
        ("none.json", "there is no such file"),
        (".", "cannot be read"),
    ):
        with pytest.raises(UserError, match=word):
            given_tokenizer(str(tmp_path / name))


# ----------------------------------------------------------------------------------------------------------------------
# The sample


def source_of(path, **flags):
    cfg = config("out", path, tokenizer="train", **flags)
    return cfg, LocalFiles(cfg.sources, ReadOptions(cfg.text_column, cfg.encoding, cfg.separator_text))


def test_validation_articles_are_not_in_the_sample(tmp_path):
    rows = make_articles(400)
    write_jsonl(tmp_path / "a.jsonl", rows)
    got = list(sample_texts(*source_of(tmp_path / "a.jsonl"), tail=False))
    wanted = [row for row in rows if not is_held_out(row["id"].encode(), 0.2)]
    assert 250 < len(got) == len(wanted) < 390
    assert got == [f"{row['title']}\n\n{row['text']}" for row in wanted]


def test_the_sample_is_spread_over_the_source(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", make_articles(9000, seed=1))
    write_jsonl(tmp_path / "in" / "b.jsonl", make_articles(9000, seed=2))
    monkeypatch.setattr(tokenizer_training, "SAMPLE_BYTES", 6_000_000)
    got = list(sample_texts(*source_of(tmp_path / "in"), tail=False))
    assert 5_000_000 < sum(len(text.encode()) for text in got) < 6_000_000 + 3 * (1 << 20)
    for seed in (1, 2):
        numbers = [int(text.split("\n")[0].split("/")[1]) for text in got if text.startswith(f"Article {seed}/")]
        assert numbers[0] < 3000 and numbers[-1] > 6000


@pytest.mark.parametrize(("held_out", "sampled"), [(0.2, 0.6), (0.5, 0.25), (0.9, 0.05)])
@pytest.mark.parametrize("limit", [None, 300_000])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "txt.gz"])
def test_the_end_that_will_be_held_out_is_not_in_the_sample(tmp_path, kind, limit, held_out, sampled):
    text = " ".join(f"word{n}" for n in range(200_000))
    path = tmp_path / f"a.{kind}"
    data = (json.dumps({"text": text}) if kind == "jsonl" else text).encode()
    path.write_bytes(gzip.compress(data) if kind == "txt.gz" else data)
    cfg, source = source_of(path, max_tokens=limit, val_fraction=held_out)
    got = "".join(sample_texts(cfg, source, tail=True))
    assert text.startswith(got)
    most = sampled * min(limit or len(text), len(text))
    assert most / 2 < len(got) <= most


@pytest.mark.parametrize("giant", [0, 19])
def test_unequal_rows_do_not_change_how_much_is_sampled(tmp_path, monkeypatch, giant):
    """The place in a .parquet file is known in rows alone. A share of its text is not the same share of its rows."""
    monkeypatch.setattr(reader, "CHUNK_BYTES", 10_000)
    rows = [{"text": " ".join(f"word{n}" for n in range(200_000 if number == giant else 3))} for number in range(20)]
    write_parquet(tmp_path / "a.parquet", rows)
    cfg, source = source_of(tmp_path / "a.parquet", val_fraction=0.2)
    got, text = "".join(sample_texts(cfg, source, tail=True)), "".join(row["text"] for row in rows)
    assert text.startswith(got) and len(got) == int(0.6 * len(text))


# ----------------------------------------------------------------------------------------------------------------------
# prepare_data.py


TRAIN = {"tokenizer": "train", "vocab_size": 300}
FLAGS = ("--tokenizer", "train", "--vocab-size", "300")


def test_threads_do_not_change_the_files(tmp_path):
    write_parquet(tmp_path / "in" / "a.parquet", make_articles(1000, seed=1), row_group_size=300)
    write_jsonl(tmp_path / "in" / "b.jsonl", make_articles(500, seed=2))
    for threads in ("1", "3"):
        env = {**os.environ, "RAYON_NUM_THREADS": threads}
        result = run_script(*command(tmp_path / threads, tmp_path / "in", *FLAGS, "--workers", threads), env=env)
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""  # no bars without a terminal
        assert "training a tokenizer of 300 tokens" in result.stdout
    assert files(tmp_path / "1") == files(tmp_path / "3")
    meta = read_meta(tmp_path / "1")
    assert (meta["tokenizer"], meta["vocab_size"]) == ("own", 300)
    assert meta["tokenizer_sha256"] == sha256(tmp_path / "1" / "tokenizer.json")
    rows = [*make_articles(1000, seed=1), *make_articles(500, seed=2)]
    got = texts(tmp_path / "1", "train") + texts(tmp_path / "1", "val")
    assert sorted(got) == sorted(f"{row['title']}\n\n{row['text']}" for row in rows)


def test_two_folders_share_a_tokenizer(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        write_jsonl(tmp_path / f"{name}.jsonl", make_articles(200, seed=seed))
    given = str(tmp_path / "a" / "tokenizer.json")
    prepare(config(tmp_path / "a", tmp_path / "a.jsonl", **TRAIN))
    prepare(config(tmp_path / "b", tmp_path / "b.jsonl", tokenizer=given))
    assert sha256(tmp_path / "a" / "tokenizer.json") == sha256(tmp_path / "b" / "tokenizer.json")
    before = files(tmp_path)
    prepare(config(tmp_path / "a", tmp_path / "a.jsonl", **TRAIN))  # finished
    prepare(config(tmp_path / "a", tmp_path / "a.jsonl", tokenizer=given))  # with the same tokenizer
    with pytest.raises(UserError, match=r"with a --tokenizer of SHA-256 \w+, not --tokenizer train --vocab-size 300"):
        prepare(config(tmp_path / "b", tmp_path / "b.jsonl", **TRAIN))
    with pytest.raises(UserError, match="--vocab-size 300, not --tokenizer train --vocab-size 320"):
        prepare(config(tmp_path / "a", tmp_path / "a.jsonl", tokenizer="train", vocab_size=320))
    with pytest.raises(UserError, match="--vocab-size 300, not --tokenizer bytes"):
        prepare(config(tmp_path / "a", tmp_path / "a.jsonl"))
    assert files(tmp_path) == before
    with pytest.raises(UserError, match="--overwrite deletes this file; copy it to another folder first"):
        prepare(config(tmp_path / "a", tmp_path / "a.jsonl", tokenizer=given, overwrite=True))
    assert files(tmp_path) == before
    prepare(config(tmp_path / "a", tmp_path / "a.jsonl", overwrite=True))
    assert not (tmp_path / "a" / "tokenizer.json").exists()


def test_flags():
    for flags in (("--vocab-size", "500"), ("--tokenizer", "train", "--vocab-size", "65537"), ("--tokenizer", "")):
        assert_user_error(run_script("prepare_data.py", "--source", "sample", *flags), flags[-2])


def test_a_text_too_short_for_the_vocabulary(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", make_articles(100, words=20))
    with pytest.raises(UserError, match=r"--vocab-size 30000: .* give --vocab-size (\d+), or more text") as error:
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl", tokenizer="train", vocab_size=30_000))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    size = int(str(error.value).split("give --vocab-size ")[1].split(",")[0])
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl", tokenizer="train", vocab_size=size))
    assert read_meta(tmp_path / "out")["vocab_size"] == size


def test_a_word_without_an_end_is_cut_for_training():
    """DNA without a blank is one word, and each merge would read all of it."""
    assert 100 < max(map(len, learn_tokens(["a" * 5000], 300))) <= tokenizer_training.LONGEST_PIECE


def test_ids_that_all_fall_into_the_validation_share_are_named(tmp_path):
    id = next(str(n) for n in range(100) if is_held_out(str(n).encode(), 0.2))
    write_jsonl(tmp_path / "a.jsonl", [{**row, "id": id} for row in make_articles(100)])
    with pytest.raises(UserError, match=r"^--tokenizer train: all documents fall into the validation share.*ids"):
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl", **TRAIN))


def test_a_bad_row_that_training_meets_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "CHUNK_BYTES", 10_000)  # so that the row is not in the first chunk
    write_jsonl(tmp_path / "a.jsonl", [*make_articles(300), {"no": "text"}])
    with pytest.raises(UserError, match=r"^a\.jsonl, line 301: has no 'text'"):
        prepare(config(tmp_path / "out", tmp_path / "a.jsonl", **TRAIN))


def test_a_tokenizer_with_more_tokens_than_a_shard_can_name_is_refused(tmp_path):
    tokens = [bytes([byte]) for byte in range(256)]
    pairs = [a + b for a in tokens for b in tokens]
    for count, fits in ((65_279, True), (65_280, False)):
        path = tmp_path / f"{count}.json"
        path.write_text(to_json(own_tokenizer("large", tokens + pairs[:count])), encoding="utf-8")
        if fits:
            assert load_tokenizer(given_tokenizer(str(path))).n_vocab == 65_536
        else:
            with pytest.raises(UserError, match=r"has 65,537 tokens; a shard can hold 65,536"):
                given_tokenizer(str(path))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.json.tmp"])
def test_a_tokenizer_of_somebody_else_stays(tmp_path, name):
    write_jsonl(tmp_path / "a.jsonl", make_articles(200))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=rf"{name}.*not made by this command"):
            prepare(config(tmp_path / "out", tmp_path / "a.jsonl", **TRAIN, overwrite=overwrite))
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl"))  # writes no tokenizer.json
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl", overwrite=True))
    assert (tmp_path / "out" / name).read_text() == "mine"


def test_a_tokenizer_that_is_lost_or_damaged_half_way(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", make_articles(3000))
    out = tmp_path / "out"

    def stop(self, position):
        raise UserError("stop")

    with monkeypatch.context() as patched, pytest.raises(UserError, match="stop"):
        patched.setattr(prepare_data.Display, "update", stop)
        prepare(config(out, tmp_path / "a.parquet", **TRAIN))
    assert json.loads((out / "progress.json").read_text())["splits"]["train"]["tokens"] > 0
    shutil.copy(out / "tokenizer.json", tmp_path / "kept.json")
    (out / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json.*: is damaged"):
        prepare(config(out, tmp_path / "a.parquet", **TRAIN))
    (out / "tokenizer.json").unlink()
    prepare(config(out, tmp_path / "a.parquet", **TRAIN))  # trains it again
    prepare(config(tmp_path / "once", tmp_path / "a.parquet", **TRAIN))
    assert files(out) == files(tmp_path / "once")
    assert sha256(out / "tokenizer.json") == sha256(tmp_path / "kept.json")
    (out / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is not the tokenizer of the shards beside it"):
        prepare(config(out, tmp_path / "a.parquet", **TRAIN))
    (out / "tokenizer.json").unlink()
    assert_user_error(
        run_script("train.py", "--data-dir", out, "--device", "cpu", "--check"), "tokenizer.json", "cannot be read"
    )


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_held_out_end_with_a_trained_tokenizer(tmp_path, kind):
    """For one document, and for ids that are all the same, where the tokenizer is trained again without the end."""
    path = tmp_path / f"a.{kind}"
    rows = make_articles(300)
    if kind == "txt":
        path.write_text(" ".join(row["text"] for row in rows), encoding="utf-8")
    else:
        write_jsonl(path, [{**row, "id": "1"} for row in rows])
    prepare(config(tmp_path / "out", path, **TRAIN))
    meta = read_meta(tmp_path / "out")
    assert meta["splits"]["val"]["tokens"] == int(0.2 * sum(split["tokens"] for split in meta["splits"].values()))
    cfg, source = source_of(path)
    assert (tmp_path / "out" / "tokenizer.json").read_text("utf-8") == train_tokenizer(
        sample_texts(cfg, source, True), 300
    )
    assert not (tmp_path / "out" / "progress.json").exists()


def test_a_tokenizer_that_is_trained_again_cuts_the_documents_too(tmp_path, monkeypatch):
    """Long documents are cut where their tokens do not change, so by the tokenizer that makes the tokens."""
    write_jsonl(tmp_path / "a.jsonl", [{**row, "id": "1"} for row in make_articles(300)])
    seen, read = [], prepare_data.read_chunks
    monkeypatch.setattr(
        prepare_data,
        "read_chunks",
        lambda path, name, options: (seen.append(options.tokenizer), read(path, name, options))[1],
    )
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl", **TRAIN))
    assert len(seen) == 2 and seen[0] != seen[1] == (tmp_path / "out" / "tokenizer.json").read_text("utf-8")


def test_a_tokenizer_that_is_trained_again_is_loaded_before_the_workers_begin(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", [{**row, "id": "1"} for row in make_articles(300)])
    loaded, load = [], prepare_data.bulk_encoder
    monkeypatch.setattr(prepare_data, "bulk_encoder", lambda tokenizer: (loaded.append(tokenizer), load(tokenizer))[1])
    prepare(config(tmp_path / "out", tmp_path / "a.jsonl", **TRAIN))
    assert len(loaded) == 2 and loaded[1] == (tmp_path / "out" / "tokenizer.json").read_text("utf-8")


@posix
def test_kills_at_random_moments(tmp_path):
    kills = int(os.environ.get("PREPARE_KILLS", "2"))
    write_parquet(tmp_path / "in" / "a.parquet", make_articles(3000, seed=1), row_group_size=300)
    write_jsonl(tmp_path / "in" / "b.jsonl", [{**row, "id": "1"} for row in make_articles(3000, seed=2)])
    arguments = command(tmp_path / "out", tmp_path / "in", *FLAGS, "--shard-tokens", "100000")
    once = run_script(*command(tmp_path / "once", tmp_path / "in", *FLAGS, "--shard-tokens", "100000"))
    assert once.returncode == 0, once.stderr
    kill_until(kills, arguments, tmp_path / "out", files(tmp_path / "once"), longest=4.0)


# ----------------------------------------------------------------------------------------------------------------------
# All the way


HINDI = (
    "गंगा भारत की सबसे लंबी नदी है। यह हिमालय से निकलती है और बंगाल की खाड़ी में गिरती है।",
    "हिन्दी भारत में सबसे अधिक बोली जाने वाली भाषा है। इसे देवनागरी लिपि में लिखा जाता है।",
    "ताजमहल आगरा में यमुना नदी के किनारे बना है। इसे देखने हर साल लाखों लोग आते हैं।",
    "चाय असम और दार्जिलिंग में उगती है। लोग सुबह उठकर गरम चाय पीते हैं और अख़बार पढ़ते हैं।",
    "मोर भारत का राष्ट्रीय पक्षी है। वर्षा के दिनों में वह पंख फैलाकर नाचता है।",
)


def test_hindi_from_text_to_an_exported_model(tmp_path, capsys):
    rng = random.Random(0)
    rows = [{"id": str(n), "title": f"लेख {n}", "text": " ".join(rng.choices(HINDI, k=6))} for n in range(300)]
    write_jsonl(tmp_path / "hindi.jsonl", rows)
    data, runs, hf = tmp_path / "data", tmp_path / "runs", tmp_path / "my-model"
    shape = ["--n-layer=1", "--n-head=2", "--n-embd=32", "--n-inner=64", "--block-size=32", "--tokens-per-iter=512"]
    usual = ["--batch-size=16", "--device=cpu", "--dtype=float32", "--eval-tokens=1024", "--compile=off"]
    where = ["--data-dir", str(data), "--out-dir", str(runs)]

    def ran(*arguments) -> str:
        result = run_script(*arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    ran(*command(data, tmp_path / "hindi.jsonl", "--tokenizer", "train", "--vocab-size", "400"))
    length = ["--max-iters", "60", "--learning-rate", "1e-2", "--eval-interval", "30"]
    told = ran("train.py", *where, *usual, *shape, *length)
    tokenizer = (data / "tokenizer.json").read_bytes().decode()
    assert f"tokenizer {tokenizer_name(tokenizer)}" in told
    rows = [json.loads(line) for line in (runs / "metrics.jsonl").read_text().splitlines()]
    bits = [row["bits_per_byte"] for row in rows if "bits_per_byte" in row]
    assert bits[-1] < bits[0] / 2
    assert checkpoint.load(runs / "best.pt")["tokenizer"] == tokenizer
    train.train(parse(TrainConfig, "", [*where, *usual, *shape, "--eval-only"]))
    assert "bits per byte" in capsys.readouterr().out
    ran("train.py", *where, *usual, "--resume", "--max-iters", "70")

    # The same name with other content: every command that compares tokenizers notices.
    other = tmp_path / "other"
    ran(
        *command(
            other, tmp_path / "hindi.jsonl", "--tokenizer", "train", "--vocab-size", "400", "--val-fraction", "0.5"
        )
    )
    assert (other / "tokenizer.json").read_bytes().decode() != tokenizer
    new = ["--out-dir", str(tmp_path / "new"), "--init-from", str(runs)]
    for more in (["--resume"], ["--eval-only"], new):
        cfg = parse(TrainConfig, "", [*where, "--data-dir", str(other), *usual, *shape, *more])
        with pytest.raises(UserError, match=f"was trained with the tokenizer {tokenizer_name(tokenizer)}"):
            train.train(cfg)
    train.train(parse(TrainConfig, "", [*where, *usual, *shape, *new, "--max-iters", "2"]))

    # Generating and exporting work without the data.
    shutil.rmtree(data)
    generate = ["generate.py", "--checkpoint", runs, "--device", "cpu", "--dtype", "float32", "--prompt", "भारत"]
    text = ran(*generate, "--max-new-tokens", "40", "--seed", "1")
    assert text.startswith("भारत")
    assert sum("DEVANAGARI" in unicodedata.name(c, "") for c in text) > len(text) / 2
    ran("export.py", "--checkpoint", runs, "--out-dir", hf)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(hf)
    assert [theirs(line)["input_ids"] for line in HINDI] == [
        load_tokenizer(tokenizer).encode_ordinary(line) for line in HINDI
    ]
    model = transformers.AutoModelForCausalLM.from_pretrained(hf)
    ids = model.generate(**theirs("भारत", return_tensors="pt"), max_new_tokens=10, do_sample=False, eos_token_id=-1)
    ours = ran(*generate, "--max-new-tokens", "10", "--temperature", "0", "--ignore-eot")
    assert theirs.decode(ids[0]) == ours.removesuffix("\n")


@needs_wikipedia
def test_real_articles_come_back_exactly(tmp_path):
    source = os.environ["WIKIPEDIA_SAMPLE_DIR"]
    prepare(
        PrepareConfig(source=source, data_dir=str(tmp_path), tokenizer="train", vocab_size=4096, max_tokens=3_000_000)
    )
    own = (tmp_path / "tokenizer.json").read_text("utf-8")
    theirs, encoding = tokenizers.Tokenizer.from_str(own), load_tokenizer(own)
    some = texts(tmp_path, "train")[:2000]
    assert [encoding.encode_ordinary(text) for text in some] == [one.ids for one in theirs.encode_batch(some)]
