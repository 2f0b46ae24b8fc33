"""Exported models, opened by the tools they are meant for in processes that know nothing of this project. Their results are
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
from conftest import REPO, assert_user_error, needs_gpt2, run_script
from safetensors.torch import load_file, save_file

import export
from config import ExportConfig, ModelConfig, TrainConfig
from internals import checkpoint, huggingface
from internals.cli import parse
from internals.start import UserError
from internals.tokenizer import load_tokenizer
from internals.windows import TokenStream, ValidationWindows
from model import GPT

VOCAB_SIZE = {"gpt2": 50257, "bytes": 257}
TOKENIZERS = [pytest.param("gpt2", marks=needs_gpt2), "bytes"]
SIZES = {"n_layer": 3, "n_head": 4, "n_embd": 64, "n_inner": 200, "block_size": 128}
PROMPT = "The best thing is"

# ----------------------------------------------------------------------------------------------------------------------
# What the tests share


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
    """Over 2,000 texts: every character that Unicode has room for, in order, and a thousand of mixed kinds."""
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
    """The tokenizer's name, the model, and the folder that the command wrote, for each tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    model = save_checkpoint(folder / "best.pt", request.param)
    result = run_script("export.py", "--checkpoint", folder / "best.pt", "--out-dir", folder / "my-model")
    assert result.returncode == 0, result.stderr
    assert "my-model" in result.stdout and result.stderr == ""
    return request.param, model, folder / "my-model"


def plain_python(script: str, folder: Path, *args) -> subprocess.CompletedProcess:
    """Run Python away from this project, such that none of its modules can be imported, and without a network."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
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
    assert ours.std() > 1  # logits close to 0 would agree whatever happens
    assert logits.shape == ours.shape  # the real vocabulary, no padded rows
    torch.testing.assert_close(logits, ours, atol=1e-5, rtol=1e-5)
    assert result["dtype"] == "torch.float32"
    assert result["greedy"] == greedy(model, idx[0, :20].tolist(), 100)

    assert result["ids"] == [tokenizer.encode_ordinary(text) for text in texts]
    assert result["decoded"] == texts
    assert result["default_ids"] == result["ids"][:50]  # no special token's text in these
    eot = tokenizer.eot_token
    assert result["end_of_text"] == [eot, [*tokenizer.encode_ordinary("a"), eot, *tokenizer.encode_ordinary("b")]]
    prompt = tokenizer.encode_ordinary(PROMPT)
    assert result["text"] == tokenizer.decode(until_end(prompt + greedy(model, prompt, 20), eot))


def until_end(ids: list[int], eot: int) -> list[int]:
    return ids[: ids.index(eot)] if eot in ids else ids


def test_the_files_of_a_folder(exported):
    name, _, folder = exported
    weights = load_file(folder / "model.safetensors")
    assert weights["transformer.wte.weight"].shape == (VOCAB_SIZE[name], SIZES["n_embd"])  # without padded rows
    assert "lm_head.weight" not in weights
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1  # one file that others may not read makes the folder useless to them
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "vocab.json", "merges.txt", "README.md",
    }  # fmt: skip


@needs_gpt2
def test_merges_are_those_of_gpt2():
    merges = huggingface.merges(load_tokenizer("gpt2"))
    assert len(merges) == 50_000
    assert merges[:5] == ["Ġ t", "Ġ a", "h e", "i n", "r e"]  # merges.txt as OpenAI published it begins so


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


def test_gguf_holds_the_same_numbers(exported_gguf):
    import gguf

    name, model, path = exported_gguf
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    ours = model.state_dict()
    assert len(tensors) == len(ours)
    assert torch.equal(tensors["token_embd.weight"], ours["transformer.wte.weight"][: VOCAB_SIZE[name]])
    assert torch.equal(tensors["blk.2.ffn_down.weight"], ours["transformer.h.2.mlp.c_proj.weight"])
    assert reader.get_field("gpt2.context_length").contents() == SIZES["block_size"]
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    assert len(tokens) == VOCAB_SIZE[name] and tokens[-1] == "<|endoftext|>"


@pytest.mark.skipif(
    "NODE_LLAMA_CPP_DIR" not in os.environ,
    reason="needs llama.cpp: npm install --ignore-scripts node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1 in "
    "some folder, and set NODE_LLAMA_CPP_DIR to it",
)
def test_llama_cpp_computes_the_same(exported_gguf, texts):
    name, model, path = exported_gguf
    tokenizer = load_tokenizer(name)
    prompt = tokenizer.encode_ordinary(PROMPT)
    texts = [text.replace("\0", "") for text in texts]  # C's strings end there
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


def card(tmp_path: Path, **more) -> str:
    model = save_checkpoint(tmp_path / "best.pt", "bytes", **more)
    return export.model_card("my-model", checkpoint.load(tmp_path / "best.pt"), model, "usage")


def test_card_tells_what_the_checkpoint_says(tmp_path):
    text = card(tmp_path, data=DATA)
    count = 3 * (4 * 64 * 64 + 2 * 64 * 200 + 9 * 64 + 200) + 2 * 64 + (257 + 128) * 64
    for words in (
        f"{count:,} (", "1,200", "4,915,200", "1.5000 nats", f"{math.exp(1.5):.2f} per token", "`b04c8d1c`",
        "9,000,000 tokens, 40,000,000 bytes", f"{1.5 / math.log(2) * 100_000 / 450_000:.4f} of", "CC BY-SA",
        "datasets: wikimedia/wikipedia", "language: simple", "random weights",
    ):  # fmt: skip
        assert words in text, words


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
@pytest.mark.parametrize("moment", ["save", "model_card", "fsync", "rename"])
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


def test_gguf_without_its_package(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "best.pt", "bytes")
    monkeypatch.setitem(sys.modules, "gguf", None)  # what `import gguf` then raises is an ImportError
    config = ExportConfig(checkpoint=str(tmp_path / "best.pt"), out_dir=str(tmp_path / "out"), format="gguf")
    with pytest.raises(UserError, match="pip install gguf"):
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
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------------
# And back


def import_gpt2(folder: str | Path, block_size: int, tokenizer: str = "bytes", dropout: float = 0.0) -> GPT:
    return huggingface.import_gpt2(str(folder), tokenizer, ModelConfig(block_size=block_size, dropout=dropout)).eval()


def test_import_undoes_export_bit_for_bit(exported):
    name, model, folder = exported
    back = import_gpt2(folder, SIZES["block_size"], name)
    assert back.config == model.config
    for key, tensor in huggingface.real_weights(model).items():
        assert torch.equal(huggingface.real_weights(back)[key], tensor), key
    assert back.transformer.wte.weight[VOCAB_SIZE[name] :].abs().sum() == 0


@pytest.fixture(scope="module")
def foreign():
    """A random GPT-2 of transformers, with sizes unlike ours and weights far from 0."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(2)
    sizes = {"n_layer": 2, "n_head": 3, "n_embd": 48, "n_positions": 96, "vocab_size": 257}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=256, eos_token_id=256)).eval()
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn(parameter.shape)
    return model


@pytest.mark.parametrize("layout", ["as saved", "sharded", "OpenAI's names", "half precision"])
def test_import_of_a_model_that_transformers_saved(foreign, tmp_path, layout):
    model = foreign.half() if layout == "half precision" else foreign
    model.save_pretrained(tmp_path, max_shard_size="100KB" if layout == "sharded" else "1GB")
    model.float()
    if layout == "sharded":
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    if layout == "OpenAI's names":
        weights = load_file(tmp_path / "model.safetensors")
        weights = {key.removeprefix("transformer."): tensor for key, tensor in weights.items()}
        weights |= {f"h.{i}.attn.bias": torch.ones(1, 1, 96, 96).tril() for i in range(2)}
        save_file(weights, tmp_path / "model.safetensors")
    idx = torch.randint(257, (2, 64))
    ours = import_gpt2(tmp_path, block_size=64, dropout=0.2)  # 96 positions, of which 64 are kept
    assert (ours.config.n_inner, ours.config.dropout, ours.config.block_size) == (192, 0.2, 64)
    with torch.no_grad():
        theirs = foreign(idx).logits
        assert theirs.std() > 1
        torch.testing.assert_close(ours(idx), theirs, atol=1e-5, rtol=1e-5)


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: change_config(f, model_type="llama"), "model_type = 'llama'"),
        (lambda f: change_config(f, activation_function="gelu"), "activation_function = 'gelu'"),
        (lambda f: change_config(f, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
        (lambda f: change_config(f, tie_word_embeddings=False), "tie_word_embeddings"),
        (lambda f: change_config(f, n_head=5), "--n-head 5"),
        (lambda f: change_config(f, n_embd="48"), "n_embd = '48'"),
        (lambda f: change_config(f, n_embd=96), "which does not fit its config.json"),
        (lambda f: change_config(f, n_layer=3), "12 tensors are missing: transformer.h.2.attn.c_attn.bias among them"),
        (lambda f: change_config(f, n_layer=1), "12 tensors are unknown: transformer.h.1.attn.c_attn.bias among them"),
        (lambda f: change_config(f, vocab_size=70_000), "70,000 tokens does not fit the uint16"),
        (lambda f: change_config(f, vocab_size=300), r"its tokenizer \(300 tokens\) is not the data's, bytes"),
        (lambda f: (f / "vocab.json").write_text(json.dumps({"a": 0})), "is not the data's"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json: is not a BPE tokenizer"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: cannot be read"),
        (lambda f: (f / "config.json").unlink(), "config.json: cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda f: os.truncate(f / "model.safetensors", 50_000), "is damaged"),
        (lambda f: change_weights(f, lambda w: w.pop("transformer.wpe.weight")), "transformer.wpe.weight"),
        (lambda f: change_weights(f, lambda w: w.update({"score.weight": torch.ones(2)})), "score.weight"),
        (lambda f: change_weights(f, lambda w: w.update({"lm_head.weight": torch.ones(257, 48)})), "not tied"),
        (
            lambda f: change_weights(f, lambda w: w.update({"transformer.ln_f.bias": torch.ones(48).to(torch.int8)})),
            "torch.int8",
        ),
    ],
)
def test_import_refuses_what_it_cannot_train(foreign, tmp_path, spoil, words):
    foreign.save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=words):
        import_gpt2(tmp_path, block_size=64)


def test_import_refuses_more_positions_than_there_are(foreign, tmp_path):
    foreign.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"--block-size 128: .* has 96 positions"):
        import_gpt2(tmp_path, block_size=128)


FROM_THE_HUB = """
import sys
from internals import huggingface
from internals.start import run
from config import ModelConfig

run(lambda: print(huggingface.import_gpt2(sys.argv[1], "bytes", ModelConfig(block_size=64)).num_parameters()["total"]))
"""


def test_import_by_hub_id(foreign, tmp_path):
    """Offline: what the hub's client has in its cache is found, anything else is one message."""
    repository, commit = tmp_path / "hub" / "models--somebody--tiny", "b04c8d1ceb2f5cd4588862100d08de323dccfbaa"
    foreign.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = run_script("-c", FROM_THE_HUB, "somebody/tiny", env=environment)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == foreign.num_parameters() - 32 * 48  # of 96 positions 64 were kept
    for name in ("somebody/else", "./no/such/folder"):
        assert_user_error(run_script("-c", FROM_THE_HUB, name, env=environment), name, "there is no such folder")


def test_training_starts_from_a_model_of_transformers(foreign, tmp_path):
    """Its first evaluation, and `--eval-only`, give transformers' own loss on the same windows; the run can be resumed."""
    foreign.save_pretrained(tmp_path / "gpt2")
    prepared = run_script("prepare_data.py", "--preset", "demo", "--data-dir", tmp_path / "data")
    assert prepared.returncode == 0, prepared.stderr
    windows = ValidationWindows(TokenStream.open(tmp_path / "data", "val"), 64, 4096)
    tokens = torch.from_numpy(windows.batch(0, len(windows)))
    with torch.no_grad():
        logits = foreign(tokens[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()

    common = ["train.py", "--init-from", tmp_path / "gpt2", "--data-dir", tmp_path / "data", "--dtype", "float32"]
    common += ["--out-dir", tmp_path / "run", "--block-size", "64", "--eval-tokens", "4096"]
    evaluated = run_script(*common, "--eval-only")
    assert evaluated.returncode == 0, evaluated.stderr
    assert f"validation loss {expected:.4f}" in evaluated.stdout
    assert not (tmp_path / "run").exists()

    common += ["--batch-size", "8", "--tokens-per-iter", "512", "--max-iters"]
    first = run_script(*common, "2")
    assert first.returncode == 0, first.stderr
    on = run_script(*common, "4", "--resume")
    assert on.returncode == 0, on.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["val_loss"] == pytest.approx(expected, abs=1e-4)
    assert rows[-1]["iter"] == 4 and rows[-1]["val_loss"] < expected
    best = checkpoint.build_model(checkpoint.load(tmp_path / "run" / "best.pt"))
    assert (best.config.n_layer, best.config.n_embd, best.config.block_size) == (2, 48, 64)
