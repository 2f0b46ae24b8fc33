"""Small models to generate with, one of them saved, and the command that does."""

import dataclasses

import pytest
import torch
from conftest import run_script

import generate
from config import ModelConfig
from internals import checkpoint
from internals.tokenizer import load_tokenizer
from model import GPT

TINY = ModelConfig(n_layer=2, n_head=2, n_embd=32, n_inner=64, block_size=16, vocab_size=300)


def random_model(seed: int = 0, **overrides) -> GPT:
    """A model whose output depends on its context; with GPT-2's small initial weights it hardly would."""
    torch.manual_seed(seed)
    model = GPT(dataclasses.replace(TINY, **overrides)).eval()
    for name, parameter in model.named_parameters():
        gain = "ln_" in name and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=float(gain), std=0.3)
    return model


def prompt_of(length: int) -> torch.Tensor:
    return torch.randint(TINY.vocab_size, (length,))


def tokens_of(model: GPT, idx: torch.Tensor, new: int, **sampling) -> list[list[int]]:
    """All of `generate`'s tokens, one list per sample."""
    steps = list(generate.generate(model, idx, new, generate.Sampling(**sampling)))
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


BYTES = load_tokenizer("bytes")
EOT = BYTES.eot_token


class Forced(GPT):
    """A model that says the given tokens, whatever it reads."""

    def __init__(self, tokens: list[int]):
        super().__init__(ModelConfig(n_layer=1, n_head=1, n_embd=8, n_inner=8, block_size=1024, vocab_size=257))
        self.tokens, self.step = torch.tensor(tokens), -1

    def forward(self, idx, targets=None, cache=None):
        super().forward(idx, cache=cache)  # the cache is used as usual
        self.step += 1
        return torch.nn.functional.one_hot(self.tokens[self.step], 257).float().expand(1, 1, -1) * 100


def forced_bytes(text: str) -> list[int]:
    return [*text.encode(), EOT]


def save_checkpoint(path, tokenizer: str = "bytes", **changes):
    model = random_model(vocab_size=257, block_size=32)
    contents = {
        "format": 1, "model": model.state_dict(), "config": {"model": dataclasses.asdict(model.config)},
        "tokenizer": tokenizer, "iter": 10, "tokens": 1000, "val_loss": 5.5,
    }  # fmt: skip
    checkpoint.save(path, contents | changes)
    return path


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("run") / "best.pt")


def command(best, *args, **kwargs):
    return run_script("generate.py", "--device", "cpu", "--checkpoint", best, *args, **kwargs)
