"""Exported Hugging Face folders, opened by transformers in processes without this project. The results are compared
with our model and with tiktoken."""

import json
import os

import numpy as np
import torch
from conftest import needs_gpt2
from exports import PROMPT, SIZES, VOCAB_SIZE, greedy, plain_python, save_checkpoint
from safetensors.torch import load_file

import export
from config import ExportConfig
from internals.pretrained import open_model
from internals.tokenizer import load_tokenizer
from internals.tokenizer_json import merges as merges_of

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
ids = tokenizer(texts, split_special_tokens=True)["input_ids"]
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

for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    print(model.dtype)
    torch.save({name: value for name, value in model.state_dict().items()}, folder + ".pt")
"""


def test_a_folder_of_rounded_weights(tmp_path):
    weights = save_checkpoint(tmp_path / "best.pt", "bytes").state_dict()
    dtypes = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    for dtype in dtypes:
        export.export(ExportConfig(checkpoint=str(tmp_path / "best.pt"), out_dir=str(tmp_path / dtype), dtype=dtype))
        assert f"| weights | {dtype} |" in (tmp_path / dtype / "README.md").read_text()
    assert plain_python(AS_SAVED, tmp_path, *dtypes).stdout.split() == ["torch.float16", "torch.bfloat16"]
    for folder, dtype in dtypes.items():
        loaded = torch.load(tmp_path / f"{folder}.pt")
        for name, value in weights.items():
            expected = value.to(dtype)[: 257 if "wte" in name else None]
            transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            assert torch.equal(loaded[name], expected.T if transposed else expected), name
        ours, _, _ = open_model(str(tmp_path / folder))  # imported again: float32 with the rounded numbers
        assert torch.equal(ours.transformer.wpe.weight, weights["transformer.wpe.weight"].to(dtype).float())


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


def test_transformers_stays_inside_the_context(tmp_path, monkeypatch):
    """Without arguments, greedy, sampled and in batches. The model card's example runs unchanged."""
    cases = []
    gpt2 = [("gpt2", 8, PROMPT)] if "TIKTOKEN_CACHE_DIR" in os.environ else []
    for tokenizer, context, prompt in [("bytes", 8, "The"), ("bytes", 256, PROMPT), *gpt2]:
        monkeypatch.setitem(SIZES, "block_size", context)
        save_checkpoint(tmp_path / "best.pt", tokenizer)
        out_dir = tmp_path / f"{tokenizer}-{context}"
        export.export(ExportConfig(checkpoint=str(tmp_path / "best.pt"), out_dir=str(out_dir)))
        cases.append((out_dir.name, prompt, context))
    plain_python(LIMITS, tmp_path, json.dumps(cases))
