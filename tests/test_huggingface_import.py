"""Importing GPT-2s in Hugging Face format, ours and those of transformers, and refusing what cannot be trained."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import assert_user_error, needs_gpt2, run_script, without_network_settings
from exports import SIZES, VOCAB_SIZE, save_checkpoint
from safetensors.torch import load_file, save_file

import export
from config import ExportConfig, ModelConfig
from internals import checkpoint, huggingface, pretrained
from internals.start import UserError
from internals.tokenizer import load_tokenizer
from internals.tokenizer_json import vocabulary
from internals.windows import TokenStream, ValidationWindows
from model import GPT


def import_gpt2(folder: str | Path, block_size: int, tokenizer: str = "bytes", dropout: float = 0.0) -> GPT:
    config = ModelConfig(block_size=block_size, dropout=dropout)
    return pretrained.initial_model(str(folder), tokenizer, config).eval()


@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=needs_gpt2), "bytes"])
def test_import_undoes_export_bit_for_bit(name, tmp_path):
    model = save_checkpoint(tmp_path / "best.pt", name)
    export.export(ExportConfig(checkpoint=str(tmp_path / "best.pt"), out_dir=str(tmp_path / "out")))
    back = import_gpt2(tmp_path / "out", SIZES["block_size"], name)
    opened = pretrained.open_model(str(tmp_path / "out"))
    assert opened.tokenizer.name == load_tokenizer(name).name
    for other in (back, opened.model):
        assert other.config == model.config
        for key, tensor in huggingface.real_weights(model).items():
            assert torch.equal(huggingface.real_weights(other)[key], tensor), key
        assert other.transformer.wte.weight[VOCAB_SIZE[name] :].abs().sum() == 0


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
    model = copy.deepcopy(foreign).to(torch.float16 if layout == "half precision" else torch.float32)
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
        theirs = model(idx).logits
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
        (lambda f: change_config(f, n_layer=3), "12 tensors missing: transformer.h.2.attn.c_attn.bias, ..."),
        (lambda f: change_config(f, n_layer=1), "12 tensors unknown: transformer.h.1.attn.c_attn.bias, ..."),
        (
            lambda f: change_config(f, n_positions=2**62),
            "the model does not fit into memory .Storage size calculation overflowed",
        ),
        (lambda f: change_config(f, vocab_size=70_000), "is not the data's"),
        (lambda f: change_config(f, vocab_size=50_304), "prepare_data.py --tokenizer gpt2$"),
        (lambda f: change_config(f, vocab_size=300), r"\(300 tokens\) is not the data's.*; save its tokenizer there"),
        (lambda f: (f / "vocab.json").write_text(json.dumps({"a": 0})), "is not one of this project's"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json: is not a BPE tokenizer"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: is damaged, or not JSON"),
        (lambda f: (f / "config.json").unlink(), "has no config.json; save the model again"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no model"),
        (lambda f: os.truncate(f / "model.safetensors", 50_000), "is damaged"),
        (lambda f: change_weights(f, lambda w: w.pop("transformer.wpe.weight")), "transformer.wpe.weight"),
        (lambda f: change_weights(f, lambda w: w.update({"score.weight": torch.ones(2)})), "score.weight"),
        (lambda f: change_weights(f, lambda w: w.update({"lm_head.weight": torch.ones(257, 48)})), "not tied"),
        (lambda f: change_weights(f, lambda w: w.update({"lm_head.weight": torch.ones(1)})), "not tied"),
        (
            lambda f: change_weights(f, lambda w: w.update({"transformer.h.0.mlp.c_fc.weight": torch.ones(5)})),
            r"c_fc.weight is torch.float32 of shape \(5,\), which does not fit",
        ),
        (lambda f: change_config(f, activation_function="relu"), "only 'gelu_new' or 'gelu_pytorch_tanh' or "),
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


@pytest.mark.parametrize(
    ("change", "removed"),
    [
        ({"activation_function": "gelu_pytorch_tanh"}, []),
        ({"activation_function": "gelu_fast"}, []),
        ({"activation_function": "gelu_accurate"}, []),
        ({"n_ctx": 96}, ["n_positions"]),
        ({"n_ctx": 48}, []),  # obsolete: n_positions decides
        ({"max_position_embeddings": 96}, ["n_positions"]),
        ({"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}, ["n_embd", "n_layer", "n_head"]),
        ({"hidden_size": 48}, []),
        ({"n_inner": 192}, []),
        ({"resid_pdrop": 0, "attn_pdrop": 0.3, "embd_pdrop": 0.5, "reorder_and_upcast_attn": True}, []),
        ({"summary_type": "mean", "use_cache": False, "torch_dtype": "float16", "pad_token_id": 256}, []),
        ({}, ["activation_function", "layer_norm_epsilon", "scale_attn_weights", "tie_word_embeddings", "n_inner"]),
    ],
)
def test_import_understands_every_spelling(foreign, tmp_path, change, removed):
    """A valid GPT-2 is accepted however its config.json spells it; transformers reads the same model."""
    from transformers import AutoModelForCausalLM

    foreign.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in removed}))
    idx = torch.randint(257, (2, 64))
    with torch.no_grad():
        torch.testing.assert_close(import_gpt2(tmp_path, 64)(idx), foreign(idx).logits, atol=1e-4, rtol=1e-4)
        if removed != ["n_positions"] or "n_ctx" not in change:
            theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
            torch.testing.assert_close(theirs(idx).logits, foreign(idx).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [258, 320, 384, 1000])
def test_unused_rows_are_cut(foreign, tmp_path, rows):
    """With a tokenizer any number of rows; without one, only the number of tokens or its next multiple of 64 or 128."""
    model = save_checkpoint(tmp_path / "best.pt", "bytes")
    export.export(ExportConfig(checkpoint=str(tmp_path / "best.pt"), out_dir=str(tmp_path / "out")))
    more = torch.ones(rows - 257, SIZES["n_embd"])
    key = "transformer.wte.weight"
    change_weights(tmp_path / "out", lambda w: w.update({key: torch.cat([w[key], more]), "lm_head.weight": torch.cat([w[key], more])}))  # fmt: skip
    change_config(tmp_path / "out", vocab_size=rows)
    for back in (import_gpt2(tmp_path / "out", 128), pretrained.open_model(str(tmp_path / "out")).model):
        assert back.config == model.config
        assert torch.equal(huggingface.real_weights(back)[key], huggingface.real_weights(model)[key])
    for name in ("tokenizer.json", "vocab.json"):
        (tmp_path / "out" / name).unlink()
    if rows in (320, 384):
        assert import_gpt2(tmp_path / "out", 128).config.vocab_size == 257
    else:
        with pytest.raises(UserError, match="is not the data's"):
            import_gpt2(tmp_path / "out", 128)


def shards_of(foreign, folder: Path) -> dict:
    """Save the model in several files. Returns their index."""
    foreign.save_pretrained(folder, max_shard_size="100KB")
    return json.loads((folder / "model.safetensors.index.json").read_text())


def stray(folder: Path) -> None:
    """Files of another model that a glob pattern would match."""
    ones = {"transformer.wte.weight": torch.ones(257, 48), "transformer.extra": torch.ones(1)}
    for name in (
        "model-00009-of-00009.safetensors",
        "model_old.safetensors",
        "model.fp16.safetensors",
        "modelx.safetensors",
    ):
        save_file(ones, folder / name)


@pytest.mark.parametrize("layout", ["one file", "sharded", "one file and an old index"])
def test_only_the_files_of_the_model_are_read(foreign, tmp_path, layout):
    if layout == "sharded":
        shards_of(foreign, tmp_path)
    else:
        foreign.save_pretrained(tmp_path)
    if layout == "one file and an old index":
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    stray(tmp_path)
    idx = torch.randint(257, (1, 64))
    with torch.no_grad():
        torch.testing.assert_close(import_gpt2(tmp_path, 64)(idx), foreign(idx).logits, atol=1e-5, rtol=1e-5)


def test_a_tensor_is_read_from_the_file_that_the_index_names(foreign, tmp_path):
    index = shards_of(foreign, tmp_path)
    files = sorted(set(index["weight_map"].values()))
    name = next(name for name, file in index["weight_map"].items() if file == files[0])
    other = load_file(tmp_path / files[-1])
    save_file(other | {name: torch.zeros_like(load_file(tmp_path / files[0])[name])}, tmp_path / files[-1])
    idx = torch.randint(257, (1, 64))
    with torch.no_grad():
        torch.testing.assert_close(import_gpt2(tmp_path, 64)(idx), foreign(idx).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f, index: [(f / name).unlink() for name in sorted(set(index["weight_map"].values()))[:2]],
         r"are missing: model-00001-of-\d+.safetensors, model-00002"),
        (lambda f, index: index["weight_map"].pop("transformer.wpe.weight"), "1 tensor missing: transformer.wpe.weight"),
        (lambda f, index: index.pop("weight_map"), "index.json: is damaged .weight_map"),
        (lambda f, index: index.update(weight_map={}), "index.json: is damaged .weight_map"),
        (lambda f, index: index.update(weight_map=[1]), "index.json: is damaged .weight_map"),
        (lambda f, index: index["weight_map"].update(a=7), "index.json: is damaged .7 is not"),
        (lambda f, index: index["weight_map"].update(a="../x.safetensors"), "index.json: is damaged .'../x.safetensors'"),
        (lambda f, index: index["weight_map"].update(a="pytorch_model.bin"), "index.json: is damaged"),
        (lambda f, index: index["weight_map"].update(a="x.safetensors"), "are missing: x.safetensors"),
        (lambda f, index: os.truncate(f / index["weight_map"]["transformer.wpe.weight"], 100), "is damaged, or not a safetensors"),
    ],
)  # fmt: skip
def test_a_damaged_index_is_a_message(foreign, tmp_path, spoil, words):
    index = shards_of(foreign, tmp_path)
    spoil(tmp_path, index)
    stray(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=words):
        import_gpt2(tmp_path, 64)
    for text in ("", "{", "[]", "\x00"):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(UserError, match=r"index.json( \(an empty file\))?: is (damaged|not a JSON object)"):
            import_gpt2(tmp_path, 64)


def test_a_tied_head_may_have_another_dtype(foreign, tmp_path):
    foreign.save_pretrained(tmp_path)
    change_weights(tmp_path, lambda w: w.update({"lm_head.weight": w["transformer.wte.weight"].half()}))
    assert import_gpt2(tmp_path, 64).config.n_layer == 2


def test_a_tokenizer_that_changes_the_text_is_not_the_datas(tmp_path):
    """Its vocabulary alone does not tell."""
    save_checkpoint(tmp_path / "best.pt", "bytes")
    export.export(ExportConfig(checkpoint=str(tmp_path / "best.pt"), out_dir=str(tmp_path / "out")))
    path = tmp_path / "out" / "tokenizer.json"
    saved = json.loads(path.read_text())
    del saved["pre_tokenizer"]["use_regex"]  # as older files lack it
    path.write_text(json.dumps(saved))
    assert import_gpt2(tmp_path / "out", 64).config.vocab_size == 257
    for change in (
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
    ):
        path.write_text(json.dumps(saved | change))
        with pytest.raises(UserError, match=r"its tokenizer \(257 tokens\) is not one of this project's"):
            import_gpt2(tmp_path / "out", 64)


def test_names_of_one_size_that_disagree(foreign, tmp_path):
    foreign.save_pretrained(tmp_path)
    change_config(tmp_path, hidden_size=64)
    with pytest.raises(UserError, match="n_embd = 48 and hidden_size = 64"):
        import_gpt2(tmp_path, 64)


def test_the_hub_is_asked_for_exactly_these_files(foreign, tmp_path, monkeypatch):
    import huggingface_hub

    index, asked = shards_of(foreign, tmp_path), []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, allow_patterns: asked.append(allow_patterns) or str(tmp_path)
    )
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: huggingface_hub._CACHED_NO_EXIST)
    assert import_gpt2("somebody/sharded", 64).config.n_layer == 2
    assert asked == [
        ["config.json", "tokenizer.json", "vocab.json"],
        ["model.safetensors", "model.safetensors.index.json"],
        sorted(set(index["weight_map"].values())),
    ]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), "could not be written (No space left on device); make room; HF_HOME can"),
        (PermissionError(13, "Permission denied", "/cache/x"), "/cache/x: Permission denied; make room or make it writable"),
        (ImportError("Using SOCKS proxy, but"), "names a SOCKS proxy; pip install socksio pysocks"),
        (OSError("no answer from the proxy"), "the hub did not provide it (OSError); check the name, or go online"),
    ],
)  # fmt: skip
def test_a_disk_that_takes_no_download_is_not_a_wrong_name(monkeypatch, error, words):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError) as caught:
        pretrained.open_model("somebody/large")
    assert "somebody/large" in str(caught.value) and words in str(caught.value)


def test_import_refuses_more_positions_than_there_are(foreign, tmp_path):
    foreign.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"--block-size 128: .* has 96 positions"):
        import_gpt2(tmp_path, block_size=128)


FROM_THE_HUB = """
import sys
from internals.pretrained import initial_model
from internals.start import run
from config import ModelConfig

run(lambda: print(initial_model(sys.argv[1], "bytes", ModelConfig(block_size=64)).num_parameters()["total"]))
"""


def test_import_by_hub_id(foreign, tmp_path):
    """Offline: a model in the cache of the hub's client is found, anything else is one message."""
    commit = "b04c8d1ceb2f5cd4588862100d08de323dccfbaa"
    for name, size in (("split", "100KB"), ("tiny", "1GB")):
        repository = tmp_path / "hub" / f"models--somebody--{name}"
        foreign.save_pretrained(repository / "snapshots" / commit, max_shard_size=size)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
    environment = without_network_settings() | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    unknown = run_script("-c", FROM_THE_HUB, "somebody/tiny", env=environment)
    assert_user_error(unknown, "tokenizer.json is not in this machine's cache", "go online")
    (repository / ".no_exist" / commit).mkdir(parents=True)
    for name in ("tokenizer.json", "vocab.json"):  # the hub once said that it has none
        (repository / ".no_exist" / commit / name).touch()
    result = run_script("-c", FROM_THE_HUB, "somebody/tiny", env=environment)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == foreign.num_parameters() - 32 * 48  # of 96 positions 64 were kept
    split = tmp_path / "hub" / "models--somebody--split" / "snapshots" / commit  # its index and vocab.json are enough
    (split / "vocab.json").write_text(json.dumps(vocabulary(load_tokenizer("bytes"))))
    assert run_script("-c", FROM_THE_HUB, "somebody/split", env=environment).stdout == result.stdout
    (repository / "snapshots" / commit / "model.safetensors").unlink()  # another program asked for the other files only
    partly = run_script("-c", FROM_THE_HUB, "somebody/tiny", env=environment)
    assert_user_error(partly, "model.safetensors is not in this machine's cache", "go online")
    for name in ("somebody/else", "./no/such/folder"):
        result = run_script("-c", FROM_THE_HUB, name, env=environment)
        assert_user_error(result, name, "--init-from", "there is no such file or folder")


def test_training_starts_from_a_model_of_transformers(foreign, tmp_path):
    """Its first evaluation, and `--eval-only`, give transformers' own loss on the same windows; the run can be resumed."""
    foreign.save_pretrained(tmp_path / "gpt2")
    data = ["--source", "sample", "--tokenizer", "bytes", "--data-dir", tmp_path / "data"]
    prepared = run_script("prepare_data.py", *data)
    assert prepared.returncode == 0, prepared.stderr
    windows = ValidationWindows(TokenStream.open(tmp_path / "data", "val"), 64, 4096)
    tokens = torch.from_numpy(windows.batch(0, len(windows)))
    with torch.no_grad():
        logits = foreign(tokens[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()

    common = ["train.py", "--init-from", tmp_path / "gpt2", "--data-dir", tmp_path / "data", "--dtype", "float32"]
    common += ["--out-dir", tmp_path / "run", "--device", "cpu", "--block-size", "64", "--eval-tokens", "4096"]
    evaluated = run_script(*common, "--eval-only")
    assert evaluated.returncode == 0, evaluated.stderr
    assert f"loss       {expected:.4f} nats per token" in evaluated.stdout
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
