"""Opening models in generate.py and train.py: our checkpoints, folders, the hub, and whatever holds no model."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO, assert_user_error, run_script, without_network_settings, write_data
from exports import save_checkpoint

import export
import train as training
from config import ExportConfig, ModelConfig, TrainConfig
from internals import checkpoint, pretrained
from internals.cli import parse
from internals.files import write_json
from internals.shards import read_meta
from internals.start import UserError

needs_proc_mem = pytest.mark.skipif(
    not os.path.exists("/proc/self/mem"), reason="needs a file that cannot be read, such as Linux's /proc/self/mem"
)

QUIET = ["--temperature", 0, "--max-new-tokens", 8, "--prompt", "The", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """A run's folder, its model's export, and many things that are not models."""
    folder = tmp_path_factory.mktemp("places")
    save_checkpoint(folder / "run" / "best.pt", "bytes")
    save_checkpoint(folder / "stopped" / "last.pt", "bytes")
    (folder / "run" / "config.json").write_text("{}")  # train.py's, not Hugging Face's
    for name, file_format in (("hf", "hf"), ("gguf", "gguf")):
        checkpoint_path = str(folder / "run" / "best.pt")
        export.export(ExportConfig(checkpoint=checkpoint_path, out_dir=str(folder / name), format=file_format))
    shutil.copytree(folder / "hf", folder / "converted")
    (folder / "converted" / "converted-F32.gguf").touch()  # llama.cpp's converter writes into the model's folder
    shutil.copytree(folder / "hf", folder / "trainer" / "checkpoint-3")
    (folder / "trainer" / "runs").mkdir()
    for name in ("empty", "bin", "two", "begun", "lora"):
        (folder / name).mkdir()
    write_json(folder / "begun" / "config.json", TrainConfig().settings())  # a run killed before it saved anything
    (folder / "bin" / "config.json").write_bytes((folder / "hf" / "config.json").read_bytes())
    (folder / "bin" / "pytorch_model.bin").touch()
    (folder / "lora" / "adapter_config.json").touch()
    (folder / "lora" / "adapter_model.safetensors").touch()
    (folder / "two" / "best.pt").touch()
    (folder / "two" / "model.safetensors").touch()
    (folder / "text.pt").write_text("text")
    (folder / "null.pt").symlink_to("/dev/null")
    (folder / "unreadable.pt").symlink_to("/proc/self/mem")  # reading its beginning fails with EIO
    write_data(folder / "data")
    return folder


def test_generate_opens_all_that_hold_the_model(places):
    texts = set()
    for name in ("run/best.pt", "run", "stopped", "stopped/last.pt", "hf", "converted"):
        result = run_script("generate.py", "--checkpoint", places / name, *QUIET)
        assert result.returncode == 0, result.stderr
        assert str(places / name) in result.stderr and " parameters\n" in result.stderr
        texts.add(result.stdout)
    assert len(texts) == 1 and texts.pop().startswith("The")


NO_MODEL = {
    "": "neither best.pt, which train.py writes, nor the config.json and model.safetensors of a GPT-2; train one first "
    "(train.py), or name another file or folder: there are models in ",
    "empty": "holds no model",
    "begun": "holds no model",
    "data": "is a data folder",
    "data/train_000000.bin": "is a shard of tokens",
    "bin": "has no model.safetensors",
    "two": "holds two models",
    "lora": "is a LoRA adapter; merge it into its model (merge_and_unload)",
    "trainer": os.path.join("trainer", "checkpoint-3"),
    "gguf": "holds GGUF",
    "gguf/model.gguf": "is a GGUF file",
    "hf/model.safetensors": "is a safetensors file; give the folder",
    "hf/config.json": "is damaged, or not a checkpoint",
    "hf/best.pt": "there is no checkpoint",
    "run/bset.pt": "there is no checkpoint",
    "rnu": "there is no such file or folder",
    "text.pt": "is damaged, or not a checkpoint written by this project",
    "null.pt": "is not a file",
    "unreadable.pt": "cannot be read (Input/output error)",
    "a" * 300: "cannot be read (File name too long)",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, id=name[:30], marks=[needs_proc_mem] * name.startswith("unread")) for name in NO_MODEL]
)
def test_what_holds_no_model_says_what_it_is(places, name):
    source = str(places / name)
    with pytest.raises(UserError) as opened:
        pretrained.open_model(source)
    with pytest.raises(UserError) as started:
        pretrained.initial_config(source, "bytes", ModelConfig())
    for caught in (opened, started):
        assert NO_MODEL[name] in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)
    assert str(started.value).startswith("--init-from: ")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("resume", "is not a model; give --resume"),
        ("scratch", "is not a model; without --init-from, a run starts from scratch"),
        ("gpt2", "on the hub it is called openai-community/gpt2"),
        ("gpt2-xl", "on the hub it is called openai-community/gpt2-xl"),
        ("tests/nowhere", "there is no such file or folder"),  # `tests` is a folder here, not an owner on the hub
        ("./nobody/nothing", "there is no such file or folder"),
        ("nobody/best.pt", "there is no checkpoint"),
        ("nobody/nothing", "the hub did not provide it"),
        ("checkpoint", "there is no such file or folder"),
    ],
)
def test_names_that_nothing_has(monkeypatch, source, words):
    monkeypatch.chdir(REPO)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as error:
        pretrained.open_model(source)
    assert source in str(error.value) and words in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_missing_checkpoint_points_to_those_that_exist(places, tmp_path):
    """After `make demo`, generate.py without --preset finds no checkpoints/wikipedia/best.pt."""
    wanted = tmp_path / "checkpoints" / "wikipedia" / "best.pt"
    for opening in (lambda: pretrained.open_model(str(wanted)), lambda: checkpoint.load(wanted)):
        with pytest.raises(UserError, match=r"train one first \(train.py\), or name another file or folder$"):
            opening()
    for name in ("demo", "mine"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        shutil.copy(places / "run" / "best.pt", tmp_path / "checkpoints" / name)
    for opening in (lambda: pretrained.open_model(str(wanted)), lambda: checkpoint.load(wanted)):
        with pytest.raises(UserError) as caught:
            opening()
        folders = f"{tmp_path}/checkpoints/demo, {tmp_path}/checkpoints/mine"
        assert str(caught.value).endswith(f"or name another file or folder: there are models in {folders}")
    with pytest.raises(UserError, match=r"^--checkpoint: "):
        pretrained.open_model(str(wanted))


def test_generate_takes_a_model_of_the_hub(places, tmp_path):
    """Offline: from the cache of the hub's client."""
    repository, commit = tmp_path / "hub" / "models--somebody--tiny", "b04c8d1ceb2f5cd4588862100d08de323dccfbaa"
    shutil.copytree(places / "hf", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    environment = without_network_settings() | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = run_script("generate.py", "--checkpoint", "somebody/tiny", *QUIET, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout == run_script("generate.py", "--checkpoint", places / "run", *QUIET).stdout
    assert result.stderr.startswith("somebody/tiny, in Hugging Face format")


# ----------------------------------------------------------------------------------------------------------------------
# Training from a model of this project


def arguments(data: Path, out_dir: Path, *args) -> list[str]:
    sizes = ["--block-size", "32", "--batch-size", "2", "--tokens-per-iter", "64", "--eval-tokens", "64"]
    more = ["--max-iters", "2", "--dtype", "float32", "--compile", "off", "--device", "cpu"]
    return [str(value) for value in ("--data-dir", data, "--out-dir", out_dir, *sizes, *more, *args)]


def train(data: Path, out_dir: Path, *args):
    return run_script("train.py", *arguments(data, out_dir, *args))


def refusal(data: Path, out_dir: Path, *args) -> str:
    """The message with which training ends before it begins."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as error:
        patch.setattr(sys, "argv", ["train.py", *arguments(data, out_dir, *args)])
        training.train(parse(TrainConfig, ""))
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def assert_has(text: str, *words: str) -> None:
    for word in words:
        assert word in text


@pytest.mark.parametrize("name", ["run/best.pt", "run", "stopped/last.pt"])
def test_training_starts_from_an_own_model(places, tmp_path, name):
    """Sizes and weights come from the model, dropout from the command; 32 of the 128 positions are kept."""
    result = train(places / "data", tmp_path / "new", "--init-from", places / name, "--dropout", "0.25", "--learning-rate", "0", "--min-lr", "0")  # fmt: skip
    assert result.returncode == 0, result.stderr
    old, new = checkpoint.load(places / "run" / "best.pt"), checkpoint.load(tmp_path / "new" / "last.pt")
    expected = old["config"]["model"] | {"block_size": 32, "dropout": 0.25}
    assert new["config"]["model"] == expected
    assert new["config"]["init_from"] == str(places / name)
    for key, tensor in old["model"].items():
        kept = tensor[:32] if key == "transformer.wpe.weight" else tensor
        assert torch.equal(new["model"][key], kept), key
    resumed = train(places / "data", tmp_path / "new", "--init-from", places / name, "--dropout", "0.25", "--resume", "--learning-rate", "0", "--min-lr", "0")  # fmt: skip
    assert resumed.returncode == 0 and "finished" in resumed.stdout, resumed.stderr


def test_an_own_model_is_evaluated_like_its_export(places, tmp_path):
    losses = []
    for name in ("run", "run/best.pt", "hf"):
        result = train(places / "data", tmp_path / "none", "--eval-only", "--init-from", places / name)
        assert result.returncode == 0, result.stderr
        losses.append(result.stdout.split("\nloss ")[1].split()[0])
    assert len(set(losses)) == 1 and not (tmp_path / "none").exists()


def test_the_sizes_of_an_own_model_are_read_without_building_it(places, monkeypatch):
    monkeypatch.setattr(checkpoint, "GPT", None)
    config = pretrained.initial_config(str(places / "run"), "bytes", ModelConfig(block_size=32, dropout=0.1))
    assert (config.n_layer, config.block_size, config.dropout) == (3, 32, 0.1)


def test_starting_from_what_does_not_fit(places, tmp_path):
    other = write_data(tmp_path / "gpt2-data", tokenizer="gpt2")
    tokens = refusal(other, tmp_path / "new", "--init-from", places / "run")
    assert_has(tokens, "--init-from", "trained with the tokenizer bytes", "gpt2")
    longer = refusal(places / "data", tmp_path / "new", "--init-from", places / "run", "--block-size", "256", "--eval-tokens", "256", "--tokens-per-iter", "512")  # fmt: skip
    assert_has(longer, "--block-size 256", "has 128 positions", "--block-size 128")
    wider = refusal(places / "data", tmp_path / "new", "--init-from", places / "run", "--n-layer", "5")
    assert_has(wider, "--n-layer 5", "the model of --init-from has 3", "leave --n-layer out")
    for flag in (["--n-layer", "6"], ["--n_layer=6"]):  # the default of config.py
        usual = refusal(places / "data", tmp_path / "new", "--init-from", places / "run", *flag)
        assert_has(usual, "--n-layer 6", "the model of --init-from has 3", "leave --n-layer out")
    settings = {**TrainConfig().settings(), "model": {**vars(ModelConfig(n_layer=7))}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    cfg = dataclasses.replace(
        TrainConfig(data_dir=str(places / "data"), init_from=str(places / "run"), config=str(tmp_path / "config.json")),
        model=ModelConfig(n_layer=7, block_size=32),
    )
    assert (
        training.complete_config(cfg, read_meta(places / "data"), None).model.n_layer == 3
    )  # 7 is the file's, not a flag's
    misspelt = refusal(places / "data", tmp_path / "new", "--init-from", places / "rnu")
    assert_has(misspelt, "--init-from", "there is no such file or folder")
    exported = refusal(places / "data", places / "hf", "--eval-only")
    assert_has(exported, "in Hugging Face format", "--init-from")
    assert not (tmp_path / "new").exists()


def test_a_setting_that_the_model_never_heard_of_has_its_default(places, monkeypatch):
    """A field added to ModelConfig later does not break today's models."""
    later = dataclasses.make_dataclass("Later", [("qk_norm", bool, False)], bases=(ModelConfig,), frozen=True)
    monkeypatch.setattr(checkpoint, "ModelConfig", later)
    command = later(block_size=32, dropout=0.1, qk_norm=True)
    config = pretrained.initial_config(str(places / "run"), "bytes", command)
    assert (config.qk_norm, config.n_layer, config.block_size, config.dropout) == (False, 3, 32, 0.1)


# ----------------------------------------------------------------------------------------------------------------------
# Too little memory, no permission


LITTLE_MEMORY = """
import resource, sys
import generate
from config import GenerateConfig
from internals.start import run

used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 20_000_000, -1))
run(lambda: generate.main(GenerateConfig(checkpoint=sys.argv[1], device="cpu")))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc/self/statm")
def test_a_checkpoint_that_is_too_large_for_the_memory_is_not_called_damaged(tmp_path):
    config = ModelConfig(n_layer=2, n_head=2, n_embd=512, n_inner=8192, vocab_size=257)
    with checkpoint.WithoutInit():
        model = checkpoint.GPT(config)
    saved = {"model": model.state_dict(), "config": {"model": vars(config)}, "tokenizer": "bytes"}
    checkpoint.save(tmp_path / "best.pt", {"format": 1, "iter": 0, "tokens": 0, "val_loss": 1.0, **saved})
    result = run_script("-c", LITTLE_MEMORY, tmp_path / "best.pt", env=os.environ | {"PYTHONPATH": str(REPO)})
    assert_user_error(result, "memory")
    assert "damaged" not in result.stderr


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_a_file_without_permission_says_so(places, tmp_path):
    """Root reads everything, so for root the command runs as the user nobody."""
    private = tmp_path / "private.pt"
    private.write_bytes((places / "run" / "best.pt").read_bytes())
    private.chmod(0)
    if os.geteuid() != 0:
        with pytest.raises(UserError, match=r"private.pt: cannot be read \(Permission denied\)"):
            checkpoint.load(private)
        return
    tmp_path.chmod(0o711)
    script = "import os, sys; from internals import checkpoint; os.chdir(sys.argv[1]); os.setuid(65534); checkpoint.load('private.pt')"
    result = subprocess.run(
        [sys.executable, "-c", script, tmp_path], capture_output=True, text=True, cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)}
    )  # fmt: skip
    assert "UserError: private.pt: cannot be read (Permission denied)" in result.stderr


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(116, "Stale file handle"), "cannot be read (Stale file handle)"),
        (TimeoutError(110, "Connection timed out"), "cannot be read (Connection timed out)"),
        (MemoryError(), "does not fit into memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "can't allocate memory"),
        (RuntimeError("PytorchStreamReader failed reading zip archive"), "is damaged, or not a checkpoint"),
    ],
)
def test_an_error_speaks_for_itself(places, monkeypatch, error, words):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(UserError) as caught:
        checkpoint.load(places / "run" / "best.pt")
    assert words in str(caught.value) and ("damaged" in words) == ("damaged" in str(caught.value))


@needs_proc_mem
def test_folders_of_transformers_keep_their_own_words(places, tmp_path):
    (tmp_path / "config.json").write_bytes((places / "hf" / "config.json").read_bytes())
    (tmp_path / "tokenizer.json").write_bytes((places / "hf" / "tokenizer.json").read_bytes())
    (tmp_path / "model.safetensors").symlink_to("/proc/self/mem")
    with pytest.raises(UserError, match=r"model.safetensors: cannot be read \(Input/output error\)"):
        pretrained.open_model(str(tmp_path))
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"]["a"], vocabulary["model"]["vocab"]["b"] = 66, 65
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(UserError, match=r"its tokenizer \(257 tokens\) is not one of this project's"):
        pretrained.open_model(str(tmp_path))
