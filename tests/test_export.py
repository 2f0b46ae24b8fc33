"""Exported models, opened by the tools they are meant for, in processes without this project. The results are
compared with our model and with tiktoken."""

import dataclasses
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, assert_user_error, needs_gpt2, run_script, without_network_settings
from safetensors.torch import load_file

import export
from config import ExportConfig, ModelConfig, TrainConfig
from internals import checkpoint, huggingface
from internals.cli import parse
from internals.pretrained import open_model
from internals.start import UserError
from internals.tokenizer import load_tokenizer
from internals.tokenizer_json import merges as merges_of
from model import GPT

VOCAB_SIZE = {"gpt2": 50257, "bytes": 257}
TOKENIZERS = [pytest.param("gpt2", marks=needs_gpt2), "bytes"]
SIZES = {"n_layer": 3, "n_head": 4, "n_embd": 64, "n_inner": 200, "block_size": 128}
PROMPT = "The best thing is"

# ----------------------------------------------------------------------------------------------------------------------
# Shared helpers


def save_checkpoint(path: Path, tokenizer: str, **more) -> GPT:
    """A small model with weights large enough that its logits differ clearly, saved as train.py saves its best one."""
    torch.manual_seed(1)
    config = ModelConfig(**SIZES, vocab_size=VOCAB_SIZE[tokenizer])
    model = GPT(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn(parameter.shape)
    saved = {
        "format": checkpoint.FORMAT,
        "model": model.state_dict(),
        "config": dataclasses.asdict(TrainConfig(model=config)),
        "tokenizer": tokenizer,
        "iter": 1_200,
        "tokens": 4_915_200,
        "val_loss": 1.5,
    }
    checkpoint.save(path, saved | more)
    return model


@torch.no_grad()
def greedy(model: GPT, prompt: list[int], steps: int) -> list[int]:
    """The likeliest token, `steps` times, in a plain loop."""
    idx = torch.tensor([prompt])
    for _ in range(steps):
        idx = torch.cat([idx, model(idx)[:, -1:].argmax(-1)], dim=1)
    return idx[0, len(prompt) :].tolist()


def every_kind_of_text() -> list[str]:
    """Over 2,000 texts: every code point of Unicode, in order, and a thousand texts of mixed kinds."""
    characters = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]  # without surrogates
    blocks = [("", " ", "a")[i // 1000 % 3].join(characters[i : i + 1000]) for i in range(0, len(characters), 1000)]
    rng = random.Random(0)
    kinds = [
        lambda: rng.choice(["The", " history", " of", "'s", "'LL", "don't", "they've", "I'm", "it'd", " '", "''"]),
        lambda: rng.choice(
            [" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u2003", "\u200b", " \n ", "\x00", "\x1b"]
        ),
        lambda: str(rng.randrange(10 ** rng.randrange(1, 12))),
        lambda: rng.choice(["<|endoftext|>", "<|endoftext", "|>", "<|im_start|>", "<unk>", "</s>", "[MASK]"]),
        lambda: rng.choice(["👩‍👩‍👧‍👦", "🇩🇪", "👍🏽", "❤️", "é", "e\u0301", "ﬁ", "Å", "ß", "İ", "ǆ", "½", "²", "Ⅳ"]),
        lambda: rng.choice(
            ["東京は日本の首都です。", "Москва", "القاهرة", "ירושלים", "नमस्ते", "กรุงเทพ", "한국어", "Ἀθῆναι"]
        ),
        lambda: rng.choice('abcXYZ.,;:!?()[]{}#$%^&*-_=+/\\|~`"@') * rng.randrange(1, 30),
        lambda: chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])),
    ]
    mixed = ["".join(rng.choice(kinds)() for _ in range(rng.randrange(40))) for _ in range(1000)]
    return blocks + mixed


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return every_kind_of_text()


@pytest.fixture(scope="module", params=TOKENIZERS)
def exported(request, tmp_path_factory) -> tuple[str, GPT, Path]:
    """For each tokenizer: its name, the model, and the folder that the command wrote."""
    folder = tmp_path_factory.mktemp(request.param)
    model = save_checkpoint(folder / "best.pt", request.param)
    result = run_script("export.py", "--checkpoint", folder / "best.pt", "--out-dir", folder / "my-model")
    assert result.returncode == 0, result.stderr
    assert "my-model" in result.stdout and result.stderr == ""
    return request.param, model, folder / "my-model"


def plain_python(script: str, folder: Path, *args) -> subprocess.CompletedProcess:
    """Run Python outside this project, so that none of its modules can be imported, and without a network."""
    environment = {name: value for name, value in without_network_settings().items() if name != "PYTHONPATH"}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf-home"),
        "PYTHONUTF8": "1",
    }
    command = [sys.executable, "-c", script, *map(str, args)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result


# ----------------------------------------------------------------------------------------------------------------------
# A Hugging Face folder

WITH_TRANSFORMERS = """
import json, sys, numpy, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

folder, prompt = sys.argv[1:]
model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
assert not any(loading.values()), loading
tokenizer = AutoTokenizer.from_pretrained(folder)
idx = torch.tensor(json.load(open("idx.json")))
with torch.no_grad():
    numpy.save("logits.npy", model(idx).logits.numpy())
out = model.generate(idx[:1, :20], max_new_tokens=100, do_sample=False, eos_token_id=None)
texts = json.load(open("texts.json"))
ids = [tokenizer.encode(text, split_special_tokens=True) for text in texts]
pipe = pipeline("text-generation", model=folder)
result = {
    "dtype": str(model.dtype),
    "greedy": out[0, 20:].tolist(),
    "ids": ids,
    "default_ids": [tokenizer.encode(text) for text in texts[:50]],
    "decoded": tokenizer.batch_decode(ids),
    "end_of_text": [tokenizer.eos_token_id, tokenizer.encode("a<|endoftext|>b")],
    "text": pipe(prompt, max_new_tokens=20, do_sample=False)[0]["generated_text"],
}
json.dump(result, open("result.json", "w"))
"""


def test_transformers_computes_the_same(exported, texts):
    name, model, folder = exported
    tokenizer, away = load_tokenizer(name), folder.parent
    idx = torch.randint(model.config.vocab_size, (2, model.config.block_size))
    (away / "idx.json").write_text(json.dumps(idx.tolist()))
    (away / "texts.json").write_text(json.dumps(texts))
    plain_python(WITH_TRANSFORMERS, away, folder, PROMPT)
    result = json.loads((away / "result.json").read_text())
    logits = torch.from_numpy(np.load(away / "logits.npy"))

    with torch.no_grad():
        ours = model(idx)
    assert ours.std() > 1  # logits close to 0 would agree in any case
    assert logits.shape == ours.shape  # the real vocabulary, no padded rows
    torch.testing.assert_close(logits, ours, atol=1e-5, rtol=1e-5)
    assert result["dtype"] == "torch.float32"
    assert result["greedy"] == greedy(model, idx[0, :20].tolist(), 100)

    assert result["ids"] == [tokenizer.encode_ordinary(text) for text in texts]
    assert result["decoded"] == texts
    assert result["default_ids"] == result["ids"][:50]  # these contain no special token
    eot = tokenizer.eot_token
    assert result["end_of_text"] == [eot, [*tokenizer.encode_ordinary("a"), eot, *tokenizer.encode_ordinary("b")]]
    prompt = tokenizer.encode_ordinary(PROMPT)
    assert result["text"] == tokenizer.decode(until_end(prompt + greedy(model, prompt, 20), eot))


AS_SAVED = """
import sys, torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(model.dtype)
torch.save({name: value for name, value in model.state_dict().items()}, "loaded.pt")
"""


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_folder_of_rounded_weights(tmp_path, dtype):
    model = save_checkpoint(tmp_path / "best.pt", "bytes")
    export.export(ExportConfig(checkpoint=str(tmp_path / "best.pt"), out_dir=str(tmp_path / "small"), dtype=dtype))
    assert f"| weights | {dtype} |" in (tmp_path / "small" / "README.md").read_text()
    assert plain_python(AS_SAVED, tmp_path, tmp_path / "small").stdout.split() == [f"torch.{dtype}"]
    loaded, weights = torch.load(tmp_path / "loaded.pt"), model.state_dict()
    for name, value in weights.items():
        expected = value.to(getattr(torch, dtype))[: 257 if "wte" in name else None]
        transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        assert torch.equal(loaded[name], expected.T if transposed else expected), name
    ours, _, _ = open_model(str(tmp_path / "small"))  # imported again: float32 with the rounded numbers
    assert torch.equal(ours.transformer.wpe.weight, weights["transformer.wpe.weight"].to(getattr(torch, dtype)).float())


def until_end(ids: list[int], eot: int) -> list[int]:
    return ids[: ids.index(eot)] if eot in ids else ids


def test_the_files_of_a_folder(exported):
    name, _, folder = exported
    weights = load_file(folder / "model.safetensors")
    assert weights["transformer.wte.weight"].shape == (VOCAB_SIZE[name], SIZES["n_embd"])  # without padded rows
    assert "lm_head.weight" not in weights
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1  # a single file that others may not read makes the folder useless to them
    os.umask(umask := os.umask(0))
    assert os.name != "posix" or folder.stat().st_mode & 0o777 == 0o777 & ~umask  # as `mkdir` makes one
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "vocab.json", "merges.txt", "README.md",
    }  # fmt: skip


@needs_gpt2
def test_merges_are_those_of_gpt2():
    merges = merges_of(load_tokenizer("gpt2"))
    assert len(merges) == 50_000
    assert merges[:5] == ["Ġ t", "Ġ a", "h e", "i n", "r e"]  # the beginning of OpenAI's merges.txt


LIMITS = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline, set_seed

def check(folder, prompt, context):
    generate, tokenizer = pipeline("text-generation", model=folder), AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for seed in range(3):  # many samples end early, by chance
        set_seed(seed)
        generate(prompt)
    whole = generate(prompt, do_sample=False, return_tensors=True, eos_token_id=-1)[0]["generated_token_ids"]
    assert len(whole) == context, (len(whole), context)
    generate([prompt, "a", prompt[:2]], batch_size=3, num_return_sequences=2)
    try:
        generate("a b c d " * context)
    except ValueError as error:
        assert "max_length" in str(error)
    else:
        raise AssertionError("a prompt longer than the context went through")
    # A batch of prompts of several lengths gives what each gives alone
    prompts = ["a", prompt[:3], prompt[:2]]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    together = model.generate(**batch, do_sample=False, max_new_tokens=4, eos_token_id=-1)[:, -4:].tolist()
    alone = [
        model.generate(**tokenizer(text, return_tensors="pt"), do_sample=False, max_new_tokens=4, eos_token_id=-1)[0, -4:].tolist()
        for text in prompts
    ]
    assert together == alone, (together, alone)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.pad_token_id

for folder, prompt, context in json.loads(sys.argv[1]):
    check(folder, prompt, context)
    card = open(folder + "/README.md").read()
    example = card.split("```python")[1].split("```")[0]
    exec(example, {})
"""


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_transformers_stays_inside_the_context(tmp_path, monkeypatch, tokenizer):
    """Without arguments, greedy, sampled and in batches. The model card's example runs unchanged."""
    cases = []
    for context in (8, 64, 128, 256) if tokenizer == "bytes" else (8, 256):
        monkeypatch.setitem(SIZES, "block_size", context)
        save_checkpoint(tmp_path / "best.pt", tokenizer)
        out_dir = tmp_path / f"context-{context}"
        export.export(ExportConfig(checkpoint=str(tmp_path / "best.pt"), out_dir=str(out_dir)))
        prompt = "The" if (tokenizer, context) == ("bytes", 8) else PROMPT
        cases.append((out_dir.name, prompt, context))
    plain_python(LIMITS, tmp_path, json.dumps(cases))


@pytest.mark.parametrize("context", [1, 2, 3, 8, 20, 64, 117, 1024])
def test_the_example_of_a_card_fits_its_model(context):
    tokenizer = load_tokenizer("bytes")
    usage = export.how_to_load("$prompt|$new_tokens|$context", "name", tokenizer, context)
    prompt, new_tokens, shown = usage.split("|")
    assert len(prompt) + int(new_tokens) <= max(context, 2) and shown == f"{context:,}"  # the last token is not read
    assert (prompt == PROMPT) == (context >= 34)


# ----------------------------------------------------------------------------------------------------------------------
# GGUF


@pytest.fixture(scope="module")
def exported_gguf(exported) -> tuple[str, GPT, Path]:
    pytest.importorskip("gguf", reason="needs the gguf package: pip install gguf")
    name, model, folder = exported
    out_dir = folder.parent / "my-gguf"
    result = run_script(
        "export.py", "--checkpoint", folder.parent / "best.pt", "--out-dir", out_dir, "--format", "gguf"
    )
    assert result.returncode == 0, result.stderr
    return name, model, out_dir / "model.gguf"


@pytest.fixture(scope="module")
def gguf_reader(exported_gguf):
    import gguf

    return gguf.GGUFReader(exported_gguf[2])  # takes seconds with GPT-2's vocabulary


def gguf_tokenizer(reader) -> dict:
    """The fields of a GGUF file that decide its tokens."""
    names = ("model", "pre", "merges", "token_type", "bos_token_id", "eos_token_id", "add_bos_token")
    return {name: reader.get_field(f"tokenizer.ggml.{name}").contents() for name in names}


def test_gguf_holds_the_same_tokenizer(exported_gguf, gguf_reader):
    name, _, _ = exported_gguf
    eot = VOCAB_SIZE[name] - 1
    normal, control = 1, 3  # llama.cpp's numbers for the kinds of tokens
    assert gguf_tokenizer(gguf_reader) == {
        "model": "gpt2",
        "pre": "gpt-2",
        "merges": merges_of(load_tokenizer(name)) or ["<|endoftext|> <|endoftext|>"],  # llama.cpp wants at least one
        "token_type": [normal] * eot + [control],
        "bos_token_id": eot,
        "eos_token_id": eot,
        "add_bos_token": False,
    }


def test_gguf_holds_the_same_numbers(exported_gguf, gguf_reader):
    name, model, _ = exported_gguf
    reader = gguf_reader
    tensors = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    ours = model.state_dict()
    assert len(tensors) == len(ours)
    assert torch.equal(tensors["token_embd.weight"], ours["transformer.wte.weight"][: VOCAB_SIZE[name]])
    assert torch.equal(tensors["blk.2.ffn_down.weight"], ours["transformer.h.2.mlp.c_proj.weight"])
    assert reader.get_field("gpt2.context_length").contents() == SIZES["block_size"]
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    assert len(tokens) == VOCAB_SIZE[name] and tokens[-1] == "<|endoftext|>"


def save_gguf(folder: Path, dtype: str, tokenizer: str = "bytes") -> tuple[GPT, Path]:
    """A small model and its GGUF file, exported in `dtype`."""
    model = save_checkpoint(folder / "best.pt", tokenizer)
    out_dir = folder / dtype
    export.export(ExportConfig(checkpoint=str(folder / "best.pt"), out_dir=str(out_dir), format="gguf", dtype=dtype))
    return model, out_dir / "model.gguf"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_smaller_gguf_rounds_the_matrices_alone(tmp_path, dtype):
    gguf = pytest.importorskip("gguf", reason="needs the gguf package: pip install gguf")
    model, path = save_gguf(tmp_path, dtype)
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.file_type").contents() == {"float16": 1, "bfloat16": 32}[dtype]
    for tensor in reader.tensors:
        # Those that llama.cpp's convert_hf_to_gguf.py rounds: all two-dimensional ones except the position embedding
        rounded = len(tensor.shape) == 2 and tensor.name != "position_embd.weight"
        assert tensor.tensor_type.name == ({"float16": "F16", "bfloat16": "BF16"}[dtype] if rounded else "F32")
    values = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}  # bfloat16 as bytes
    wte, wpe = model.transformer.wte.weight, model.transformer.wpe.weight
    assert torch.equal(values["token_embd.weight"].view(getattr(torch, dtype)), wte[:257].to(getattr(torch, dtype)))
    assert torch.equal(values["position_embd.weight"], wpe)
    assert path.stat().st_size < 0.6 * (4 * sum(p.numel() for p in model.parameters()))


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-3), ("float16", 0.01), ("bfloat16", 0.05)])
def test_llama_cpp_from_python_computes_the_same(tmp_path, texts, dtype, tolerance, tokenizer):
    """Its GELU is a table of float16 numbers, and in the 16-bit formats it also rounds the inputs of products."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install llama-cpp-python")
    pytest.importorskip("gguf", reason="needs the gguf package: pip install gguf")
    model, path = save_gguf(tmp_path, dtype, tokenizer)
    llama = llama_cpp.Llama(
        str(path), n_ctx=SIZES["block_size"], n_threads=1, n_threads_batch=1, logits_all=True, flash_attn=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, verbose=False,
    )  # fmt: skip
    encoding = load_tokenizer(tokenizer)
    for text in texts if dtype == "float32" else []:
        text = text.replace("\0", "")  # C strings end there
        assert llama.tokenize(text.encode(), add_bos=False, special=False) == encoding.encode_ordinary(text)
    prompt, steps = encoding.encode_ordinary(PROMPT), 50
    ids = prompt + greedy(model, prompt, steps)
    llama.eval(ids)
    theirs = torch.from_numpy(llama.scores[: len(ids)].copy())
    with torch.no_grad():
        ours = model(torch.tensor([ids]))[0]
    assert (theirs - ours).std() < tolerance * ours.std()
    if dtype == "float32":
        assert theirs[len(prompt) - 1 : -1].argmax(-1).tolist() == ids[len(prompt) :]


@pytest.mark.skipif(
    "NODE_LLAMA_CPP_DIR" not in os.environ,
    reason="needs llama.cpp: npm install --ignore-scripts node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1 in "
    "some folder, and set NODE_LLAMA_CPP_DIR to it",
)
def test_llama_cpp_computes_the_same(exported_gguf, texts):
    name, model, path = exported_gguf
    tokenizer = load_tokenizer(name)
    prompt = tokenizer.encode_ordinary(PROMPT)
    texts = [text.replace("\0", "") for text in texts]  # C strings end there
    request = {"model": str(path), "texts": texts, "prompt": prompt, "steps": 50}
    result = subprocess.run(
        ["node", REPO / "tests" / "llama_cpp.mjs"],
        input=json.dumps(request), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["tokens"] == greedy(model, prompt, 50)
    assert answer["ids"] == [tokenizer.encode_ordinary(text) for text in texts]


# ----------------------------------------------------------------------------------------------------------------------
# The model card


DATA = {
    "source": {"kind": "hub", "repository": "wikimedia/wikipedia", "config": "20231101.simple", "commit": "b04c8d1c"},
    "train_tokens": 9_000_000, "train_bytes": 40_000_000, "val_tokens": 100_000, "val_bytes": 450_000,
}  # fmt: skip


def card(tmp_path: Path, file_format: str = "hf", **more) -> str:
    model = save_checkpoint(tmp_path / "best.pt", "bytes", **more)
    return export.model_card("my-model", checkpoint.load(tmp_path / "best.pt"), model, file_format, "usage")


def test_card_tells_what_the_checkpoint_says(tmp_path):
    text = card(tmp_path, data=DATA)
    count = 3 * (4 * 64 * 64 + 2 * 64 * 200 + 9 * 64 + 200) + 2 * 64 + (257 + 128) * 64
    for words in (
        f"{count:,} (", "1,200", "4,915,200", "1.5000 nats", f"{math.exp(1.5):.2f} per token", "`b04c8d1c`",
        "9,000,000 tokens, 40,000,000 bytes", f"{1.5 / math.log(2) * 100_000 / 450_000:.4f} of", "CC BY-SA",
        "datasets: wikimedia/wikipedia", 'language: "simple"', "random weights",
    ):  # fmt: skip
        assert words in text, words


@pytest.mark.parametrize("loss", [800.0, 1e4, 1e300, math.inf, math.nan])
def test_the_card_of_a_diverged_model_says_so(tmp_path, loss):
    text = card(tmp_path, data=DATA, val_loss=loss)
    assert "diverged" in text and max(len(line) for line in text.splitlines()) < 300
    assert ("bits per byte" in text) == math.isfinite(loss)


def test_only_a_folder_for_transformers_names_that_library(tmp_path):
    assert "library_name: transformers" in card(tmp_path) and "library_name" not in card(tmp_path, "gguf")


def test_card_does_not_guess(tmp_path):
    text = card(tmp_path)
    assert "not recorded in the checkpoint" in text
    assert "CC BY-SA" not in text and "bits per byte" not in text and "datasets:" not in text


# ----------------------------------------------------------------------------------------------------------------------
# Whole or not at all


def test_presets_leave_out_dir_alone(capsys):
    config = parse(ExportConfig, "", ["--preset", "demo", "--out-dir", "my-model"])
    assert (config.checkpoint, config.out_dir) == ("checkpoints/demo/best.pt", "my-model")
    with pytest.raises(SystemExit) as stop:
        parse(ExportConfig, "", ["--preset", "demo"])
    assert stop.value.code == 2 and "--out-dir" in capsys.readouterr().err


def test_the_folder_of_a_run_is_its_best_model(tmp_path, capsys):
    save_checkpoint(tmp_path / "run" / "best.pt", "bytes")
    export.export(ExportConfig(checkpoint=str(tmp_path / "run"), out_dir=str(tmp_path / "out")))
    assert "\nLoad it (pip install transformers): python -c " in capsys.readouterr().out
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("kind", ["file", "folder", "empty folder", "dangling link"])
def test_nothing_is_overwritten(tmp_path, kind):
    save_checkpoint(tmp_path / "best.pt", "bytes")
    out_dir = tmp_path / "out"
    if kind == "file":
        out_dir.write_text("mine")
    elif kind == "dangling link":
        out_dir.symlink_to(tmp_path / "nowhere")
    else:
        out_dir.mkdir()
        if kind == "folder":
            (out_dir / "mine").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="exists already"):
        export.export(ExportConfig(checkpoint=str(tmp_path / "best.pt"), out_dir=str(out_dir)))
    assert sorted(tmp_path.rglob("*")) == before


KILLED = """
import os, signal, sys
import export
from config import ExportConfig
from internals import huggingface

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

module = next(m for m in (export, huggingface, os) if hasattr(m, sys.argv[1]))
setattr(module, sys.argv[1], die)
export.export(ExportConfig(checkpoint=sys.argv[2], out_dir=sys.argv[3]))
"""


@pytest.mark.skipif(os.name != "posix", reason="needs kill -9")
@pytest.mark.parametrize("moment", ["save", "model_card", "fsync", "replace"])
def test_killed_export_leaves_nothing_that_looks_whole(tmp_path, moment):
    save_checkpoint(tmp_path / "best.pt", "bytes")
    out_dir = tmp_path / "my-model"
    assert run_script("-c", KILLED, moment, tmp_path / "best.pt", out_dir).returncode == -9
    assert not out_dir.exists()
    left = [path for path in tmp_path.iterdir() if path.name != "best.pt"]
    assert all(path.name.startswith(".my-model-") and os.listdir(path) == ["incomplete"] for path in left)
    export.export(ExportConfig(checkpoint=str(tmp_path / "best.pt"), out_dir=str(out_dir)))  # and it can be repeated
    assert (out_dir / "config.json").exists()


FULL_DISK = """
import resource, signal, sys
import export
from config import ExportConfig
from internals.start import run

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
run(lambda: export.export(ExportConfig(checkpoint=sys.argv[1], out_dir=sys.argv[2], format=sys.argv[3])))
"""


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on the size of files")
@pytest.mark.parametrize("file_format", ["hf", "gguf"])
def test_full_disk_is_one_message_and_leaves_nothing(tmp_path, file_format):
    save_checkpoint(tmp_path / "best.pt", "bytes")
    result = run_script("-c", FULL_DISK, tmp_path / "best.pt", tmp_path / "my-model", file_format)
    assert_user_error(result, "--out-dir", "my-model", "could not be written", "nothing was left there")
    assert os.listdir(tmp_path) == ["best.pt"]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_one_message_and_leaves_nothing(tmp_path, monkeypatch, error):
    def fail(*args):
        raise error

    save_checkpoint(tmp_path / "best.pt", "bytes")
    monkeypatch.setattr(huggingface, "write_huggingface", fail)
    with pytest.raises(UserError, match=r"--checkpoint .*best\.pt: too little memory"):
        export.export(ExportConfig(checkpoint=str(tmp_path / "best.pt"), out_dir=str(tmp_path / "out")))
    assert os.listdir(tmp_path) == ["best.pt"]


@pytest.mark.skipif(os.name != "posix", reason="only here may a path hold any bytes")
def test_paths_that_are_not_utf8(tmp_path):
    pytest.importorskip("gguf", reason="needs the gguf package: pip install gguf")
    settings = dataclasses.asdict(TrainConfig(model=ModelConfig(**SIZES, vocab_size=257), init_from="mod\udce8l"))
    save_checkpoint(tmp_path / "best.pt", "bytes", config=settings)
    out_dir, environment = tmp_path / "m\udce8", os.environ | {"PYTHONIOENCODING": "utf-8"}
    command = ["export.py", "--checkpoint", tmp_path / "best.pt", "--out-dir", out_dir]
    assert_user_error(run_script(*command, env=environment), "--out-dir", "is not UTF-8")
    assert os.listdir(tmp_path) == ["best.pt"]
    result = run_script(*command, "--format", "gguf", env=environment)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert "\\udce8: " in result.stdout and "\nLoad it" in result.stdout
    assert "| started from | `mod?l` |" in (out_dir / "README.md").read_text(encoding="utf-8")


def test_gguf_without_its_package_or_with_an_old_one(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf", reason="needs the gguf package: pip install gguf")
    save_checkpoint(tmp_path / "best.pt", "bytes")
    config = ExportConfig(checkpoint=str(tmp_path / "best.pt"), out_dir=str(tmp_path / "out"), format="gguf")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="pip install gguf"):
        patch.setitem(sys.modules, "gguf", None)  # makes `import gguf` raise an ImportError
        export.export(config)
    monkeypatch.delattr(gguf.ReaderField, "contents")  # before version 0.16
    with pytest.raises(UserError, match="too old; pip install --upgrade gguf"):
        export.export(config)
    assert os.listdir(tmp_path) == ["best.pt"]


def test_checkpoint_that_cannot_be_used(tmp_path):
    config = ExportConfig(checkpoint=str(tmp_path / "best.pt"), out_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match="there is no checkpoint"):
        export.export(config)
    save_checkpoint(tmp_path / "best.pt", "bytes")
    saved = checkpoint.load(tmp_path / "best.pt")
    checkpoint.save(tmp_path / "best.pt", saved | {"tokenizer": "klingon"})
    with pytest.raises(UserError, match="klingon"):
        export.export(config)
    for other, words in (("data/meta.json", "is a data folder"), ("hf/model.safetensors", "in Hugging Face format")):
        (tmp_path / other).parent.mkdir()
        (tmp_path / other).touch()
        with pytest.raises(UserError, match=words):
            export.export(dataclasses.replace(config, checkpoint=str((tmp_path / other).parent)))
    assert not (tmp_path / "out").exists()
