"""A small model, its export as a Hugging Face folder, and the texts and programs that it is compared with."""

import dataclasses
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import needs_gpt2, run_script, without_network_settings

from config import ModelConfig, TrainConfig
from internals import checkpoint
from model import GPT

VOCAB_SIZE = {"gpt2": 50257, "bytes": 257}
TOKENIZERS = [pytest.param("gpt2", marks=needs_gpt2), "bytes"]
SIZES = {"n_layer": 3, "n_head": 4, "n_embd": 64, "n_inner": 200, "block_size": 128}
PROMPT = "The best thing is"


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


@pytest.fixture(scope="module", params=TOKENIZERS)
def exported(request, tmp_path_factory) -> tuple[str, GPT, Path]:
    """For each tokenizer: its name, the model, and the folder that the command wrote."""
    folder = tmp_path_factory.mktemp(request.param)
    model = save_checkpoint(folder / "best.pt", request.param)
    result = run_script("export.py", "--checkpoint", folder / "best.pt", "--out-dir", folder / "my-model")
    assert result.returncode == 0, result.stderr
    assert "my-model" in result.stdout and result.stderr == ""
    return request.param, model, folder / "my-model"


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


def gguf_tokenizer(reader) -> dict:
    """The fields of a GGUF file that decide its tokens."""
    names = ("model", "pre", "merges", "token_type", "bos_token_id", "eos_token_id", "add_bos_token")
    return {name: reader.get_field(f"tokenizer.ggml.{name}").contents() for name in names}
