"""An export computes what the model computes: a changed architecture is refused, an unchanged one is not."""

import os
from pathlib import Path

import pytest
import torch
from exports import save_checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

import export
import model as model_room
from config import ExportConfig, ModelConfig
from internals import gpt2_reference, huggingface
from internals.start import UserError
from internals.tokenizer import load_tokenizer
from model import GPT, MLP, Block

FORMATS = ["hf", "gguf"]


def rotated(q: Tensor) -> Tensor:
    """Rotary position embeddings (Su et al., 2021)."""
    half = q.size(-1) // 2
    angles = torch.arange(q.size(-2))[:, None] / 10_000 ** (torch.arange(half) / half)
    a, b = q.split(half, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


attention = F.scaled_dot_product_attention


def windowed(q: Tensor, k: Tensor, v: Tensor, **_) -> Tensor:
    """A token sees 100 tokens at most."""
    T = q.size(-2)
    return attention(q, k, v, attn_mask=torch.ones(T, T, dtype=torch.bool).tril().triu(-99))


class RMSNorm(nn.RMSNorm):
    def __init__(self, size: int, eps: float):
        super().__init__(size, eps)


class AnotherNorm(nn.LayerNorm):
    def __init__(self, size: int, eps: float):
        super().__init__(size, eps=1e-6)


class Biasless(nn.Linear):
    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)


class Untied(GPT):
    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)

    def head(self, x: Tensor) -> Tensor:
        return self.lm_head(x)


class ExtraParameter(MLP):
    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.gain = nn.Parameter(torch.ones(()))


def parallel(self, x: Tensor, cache=None, layer: int = 0) -> Tensor:
    return x + self.attn(self.ln_1(x), cache, layer) + self.mlp(self.ln_2(x))


def only_float32(self, x: Tensor) -> Tensor:
    weight = self.c_fc.weight.float()
    return self.c_proj(F.gelu(x.float() @ weight.T, approximate="tanh"))


def no_bias(monkeypatch) -> None:
    monkeypatch.setattr(model_room.nn, "Linear", Biasless)
    monkeypatch.setattr(GPT, "_init_weights", lambda self, module: None)


CHANGES = {
    "ReLU squared": lambda m: m.setattr(MLP, "forward", lambda self, x: self.c_proj(F.relu(self.c_fc(x)).square())),
    "exact GELU": lambda m: m.setattr(MLP, "forward", lambda self, x: self.c_proj(F.gelu(self.c_fc(x)))),
    "rotary positions": lambda m: m.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, **kwargs: attention(rotated(q), rotated(k), v, **kwargs)
    ),
    "normalised queries and keys": lambda m: m.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, k, v, **kwargs: attention(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, **kwargs),
    ),
    "attention in a window": lambda m: m.setattr(F, "scaled_dot_product_attention", windowed),
    "no biases": no_bias,
    "RMSNorm": lambda m: m.setattr(model_room.nn, "LayerNorm", RMSNorm),
    "another eps": lambda m: m.setattr(model_room.nn, "LayerNorm", AnotherNorm),
    "parallel blocks": lambda m: m.setattr(Block, "forward", parallel),
    "an extra parameter": lambda m: m.setattr(model_room, "MLP", ExtraParameter),
    "float32 alone": lambda m: m.setattr(MLP, "forward", only_float32),
}


def export_to(folder: Path, file_format: str) -> Path:
    out_dir = folder / "new" / "out"
    export.export(ExportConfig(checkpoint=str(folder / "best.pt"), out_dir=str(out_dir), format=file_format))
    return out_dir


def assert_refused(folder: Path, file_format: str) -> None:
    with pytest.raises(UserError, match="the model does not compute what GPT-2 computes") as caught:
        export_to(folder, file_format)
    assert "\n" not in str(caught.value)
    assert os.listdir(folder) == ["best.pt"]


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_architecture_is_refused(tmp_path, monkeypatch, change, file_format):
    pytest.importorskip("gguf")
    CHANGES[change](monkeypatch)
    save_checkpoint(tmp_path / "best.pt", "bytes")
    assert_refused(tmp_path, file_format)


@pytest.mark.parametrize("file_format", FORMATS)
def test_an_untied_head_is_refused(tmp_path, monkeypatch, file_format):
    for room in ("exports.GPT", "internals.checkpoint.GPT"):
        monkeypatch.setattr(room, Untied)
    save_checkpoint(tmp_path / "best.pt", "bytes")
    assert_refused(tmp_path, file_format)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_an_unchanged_model_is_exported_however_large_its_weights(tmp_path, monkeypatch, scale, file_format):
    pytest.importorskip("gguf")
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape: scale * randn(*shape))
    save_checkpoint(tmp_path / "best.pt", "bytes")
    assert (export_to(tmp_path, file_format) / "README.md").exists()


def test_a_model_whose_training_failed_is_exported_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda shape: torch.full(shape, torch.nan))
    save_checkpoint(tmp_path / "best.pt", "bytes")
    assert (export_to(tmp_path, "hf") / "README.md").exists()


def test_too_little_memory_to_check_is_not_another_architecture(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "best.pt", "bytes")

    def fail(self, idx):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(gpt2_reference.GPT2, "logits", fail)
    with pytest.raises(UserError, match="too little memory"):
        export_to(tmp_path, "hf")
    assert os.listdir(tmp_path) == ["best.pt"]


def test_the_reference_is_gpt2_of_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    model = save_checkpoint(tmp_path / "best.pt", "bytes")
    huggingface.write_huggingface(tmp_path, model, load_tokenizer("bytes"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    idx = torch.randint(257, (100,))
    with torch.no_grad():
        expected = theirs(idx[None]).logits[0]
    logits = gpt2_reference.read_huggingface(tmp_path).logits(idx)
    assert logits.std() > 1
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


def test_a_wrong_file_is_noticed(tmp_path, monkeypatch):
    """The writer is wrong, not the model: it does not transpose a projection."""
    monkeypatch.setattr(huggingface, "TRANSPOSED", ("c_attn.weight", "c_fc.weight"))
    save_checkpoint(tmp_path / "best.pt", "bytes")
    with pytest.raises(UserError, match="does not compute what GPT-2 computes"):
        export_to(tmp_path, "hf")


def test_it_is_written_without_model_py():
    source = Path(gpt2_reference.__file__).read_text(encoding="utf-8")
    assert "from model" not in source and "import model" not in source
