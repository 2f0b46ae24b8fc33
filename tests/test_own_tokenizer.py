"""A tokenizer trained on the source: the same tokens in every program and script, from text to an exported model."""

import dataclasses
import json
import os
import random
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
from articles import command, config, texts, write_jsonl
from conftest import REPO, needs_wikipedia, run_script
from exports import gguf_tokenizer

import train
from config import ModelConfig, TrainConfig
from internals import checkpoint, tokenizer_json
from internals.bulk_encoding import Texts, TiktokenEncoder, bulk_encoder, encode
from internals.cli import parse
from internals.start import UserError
from internals.text_stream import TextStream
from internals.tokenizer import given_tokenizer, load_tokenizer, tokenizer_name
from internals.tokenizer_json import END_OF_TEXT, OWN_PATTERN, canonical, merges, to_json, vocabulary
from internals.tokenizer_training import train_tokenizer
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
    vocab = value["model"]["vocab"]
    without_a = {
        token: id for token, id in vocab.items() if token != "a"
    }  # as where `tokenizers` had no initial alphabet
    for other in (without_a, {**vocab, "": len(vocab)}):
        with pytest.raises(UserError, match="is not a tokenizer"):
            canonical(json.dumps(value | {"model": {**value["model"], "vocab": other}}), "x")
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


def test_a_tokenizer_of_another_pattern_is_refused_where_it_was_stored(own, monkeypatch):
    """As after an edit of OWN_PATTERN. It would give other tokens than those that the model has learned."""
    edited = json.loads(json.dumps(tokenizer_json.OWN_PRE_TOKENIZER).replace("rR", "r"))
    assert edited != tokenizer_json.OWN_PRE_TOKENIZER
    monkeypatch.setattr(tokenizer_json, "OWN_PRE_TOKENIZER", edited)
    load_tokenizer.cache_clear()
    with pytest.raises(UserError, match=r"is damaged, or of another version \(it cuts text by another pattern\)"):
        load_tokenizer(own)


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
    length = ["--max-iters", "60", "--learning-rate", "1e-2", "--muon-lr-scale", "4", "--eval-interval", "30"]
    told = ran("train.py", *where, *usual, *shape, *length)
    tokenizer = (data / "tokenizer.json").read_bytes().decode()
    assert f"tokenizer {tokenizer_name(tokenizer)}" in " ".join(told.split())  # a long path moves the line breaks
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
    rows = pq.read_table(min(Path(os.environ["WIKIPEDIA_SAMPLE_DIR"]).glob("*.parquet"))).slice(0, 2000)
    pq.write_table(rows, tmp_path / "some.parquet")
    data = tmp_path / "data"
    prepare(config(data, tmp_path / "some.parquet", tokenizer="train", vocab_size=4096, val_fraction=0.05))
    own = (data / "tokenizer.json").read_text("utf-8")
    theirs, encoding = tokenizers.Tokenizer.from_str(own), load_tokenizer(own)
    some = texts(data, "train")
    assert len(some) > 1500
    assert [encoding.encode_ordinary(text) for text in some] == [one.ids for one in theirs.encode_batch(some)]
