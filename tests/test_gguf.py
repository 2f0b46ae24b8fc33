"""Exported GGUF files: the same tokenizer and numbers, and the same logits in llama.cpp."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, run_script
from exports import PROMPT, SIZES, TOKENIZERS, VOCAB_SIZE, gguf_tokenizer, greedy, save_checkpoint

import export
from config import ExportConfig
from internals.start import UserError
from internals.tokenizer import load_tokenizer
from internals.tokenizer_json import merges as merges_of
from model import GPT


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
