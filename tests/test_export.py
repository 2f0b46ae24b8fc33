"""export.py: the model card says what the checkpoint knows, and an export is whole or not there at all."""

import ast
import dataclasses
import math
import os
import shlex
import signal
from pathlib import Path

import pytest
import torch
from conftest import assert_user_error, run_script
from exports import PROMPT, SIZES, save_checkpoint

import export
from config import ExportConfig, ModelConfig, TrainConfig
from internals import checkpoint, huggingface
from internals.cli import parse
from internals.start import UserError
from internals.tokenizer import load_tokenizer

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
        "datasets: wikimedia/wikipedia", 'language: "en"', "random weights",
    ):  # fmt: skip
        assert words in text, words


@pytest.mark.parametrize(
    ("wikipedia", "code"), [("no", '"no"'), ("ceb", '"ceb"'), ("zh-yue", None), ("be-tarask", None)]
)
def test_the_card_names_a_language_only_by_a_code_that_the_hub_knows(tmp_path, wikipedia, code):
    source = DATA["source"] | {"config": f"20231101.{wikipedia}"}
    text = card(tmp_path, data=DATA | {"source": source})
    assert (f"\nlanguage: {code}\n" in text) if code else "language:" not in text


def test_the_card_of_a_fine_tuned_model_does_not_speak_for_the_text_of_the_first(tmp_path):
    save_checkpoint(tmp_path / "best.pt", "bytes", data=DATA)
    saved = checkpoint.load(tmp_path / "best.pt")
    saved["config"]["init_from"] = "openai-community/gpt2"
    text = export.model_card("my-model", saved, checkpoint.load_model(tmp_path / "best.pt")[0], "hf", "usage")
    assert "`openai-community/gpt2`" in text and export.STARTED_ELSEWHERE in text
    assert export.STARTED_ELSEWHERE not in card(tmp_path, data=DATA)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (None, "random weights"),
        ("openai-community/gpt2", "`openai-community/gpt2`"),
        ("checkpoints/demo", "`checkpoints/demo`"),
        ("/home/ann/models/m", "a model on the trainer's computer, `m`"),
        ("../ann/run/best.pt", "a model on the trainer's computer, `best.pt`"),
        ("C:\\Users\\ann\\m\\", "a model on the trainer's computer, `m`"),
        ("ann/best.pt", "a model on the trainer's computer, `best.pt`"),
    ],
)
def test_the_card_names_no_path_of_the_trainers_computer(source, told):
    assert export.started_from(source) == told


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


@pytest.mark.parametrize("context", [1, 2, 3, 8, 20, 64, 117, 1024])
def test_the_example_of_a_card_fits_its_model(context):
    tokenizer = load_tokenizer("bytes")
    usage = export.how_to_load("$prompt|$new_tokens|$context", "name", tokenizer, context)
    prompt, new_tokens, shown = usage.split("|")
    assert len(prompt) + int(new_tokens) <= max(context, 2) and shown == f"{context:,}"  # the last token is not read
    assert (prompt == PROMPT) == (context >= 34)


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
    if kind == "file":
        with pytest.raises(UserError, match="is not a folder; name another one"):
            export.export(ExportConfig(checkpoint=str(tmp_path / "best.pt"), out_dir=str(out_dir / "model")))
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
    assert all(path.name.startswith(".my-model-") for path in left)
    export.export(ExportConfig(checkpoint=str(tmp_path / "best.pt"), out_dir=str(out_dir)))  # and it can be repeated
    assert (out_dir / "config.json").exists()


@pytest.mark.skipif(os.name != "posix", reason="a process of Windows cannot send itself signals")
def test_a_scheduler_that_ends_the_export_leaves_nothing(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "best.pt", "bytes")
    monkeypatch.setattr(export, "model_card", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        export.main(ExportConfig(checkpoint=str(tmp_path / "best.pt"), out_dir=str(tmp_path / "my-model")))
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux's list of mapped files")
@pytest.mark.parametrize("file_format", ["hf", "gguf"])
def test_no_file_is_in_use_when_the_folder_gets_its_name(tmp_path, monkeypatch, file_format):
    """WSL's Windows drives and some network drives rename no folder with a file that is mapped."""
    save_checkpoint(tmp_path / "best.pt", "bytes")
    rename, mapped = export.files.rename, []

    def look(folder, new):
        mapped.append(str(folder) in Path("/proc/self/maps").read_text())
        rename(folder, new)

    monkeypatch.setattr(export.files, "rename", look)
    export.export(
        ExportConfig(checkpoint=str(tmp_path / "best.pt"), out_dir=str(tmp_path / "my-model"), format=file_format)
    )
    assert mapped == [False]


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


@pytest.mark.parametrize("file_format", ["hf", "gguf"])
def test_weights_beyond_the_range_of_the_dtype_are_not_exported(tmp_path, file_format):
    pytest.importorskip("gguf", reason="needs the gguf package: pip install gguf")
    save_checkpoint(tmp_path / "best.pt", "bytes")
    saved = torch.load(tmp_path / "best.pt", weights_only=True)
    saved["model"]["transformer.h.1.mlp.c_fc.weight"][0, 0] = 1e5
    torch.save(saved, tmp_path / "best.pt")
    config = ExportConfig(checkpoint=str(tmp_path / "best.pt"), out_dir=str(tmp_path / "out"), format=file_format)
    with pytest.raises(UserError, match="--dtype float16: cannot hold weights above 65,504, and this model has some"):
        export.export(dataclasses.replace(config, dtype="float16"))
    assert os.listdir(tmp_path) == ["best.pt"]
    export.export(dataclasses.replace(config, dtype="bfloat16"))


def test_only_what_gguf_rounds_must_be_in_range(tmp_path):
    pytest.importorskip("gguf", reason="needs the gguf package: pip install gguf")
    save_checkpoint(tmp_path / "best.pt", "bytes")
    saved = torch.load(tmp_path / "best.pt", weights_only=True)
    saved["model"]["transformer.ln_f.bias"][0] = 1e5  # stays in float32
    torch.save(saved, tmp_path / "best.pt")
    config = ExportConfig(checkpoint=str(tmp_path / "best.pt"), out_dir=str(tmp_path / "out"), dtype="float16")
    with pytest.raises(UserError, match="--dtype float16: cannot hold weights above 65,504"):
        export.export(config)
    export.export(dataclasses.replace(config, format="gguf"))


@pytest.mark.parametrize("name", ["my model", "a$b", 'a"b', "it's"])
def test_the_card_loads_a_folder_of_any_name(name):
    tokenizer = load_tokenizer("bytes")
    code = export.how_to_load(export.USAGE["hf"], name, tokenizer, 128).split("```python")[1].split("```")[0]
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.keyword) and node.arg == "model"]
    assert [call.value.value for call in calls] == [name]
    [line] = [
        line for line in export.how_to_load(export.USAGE["gguf"], name, tokenizer, 128).splitlines() if "-m" in line
    ]
    assert shlex.split(line) == ["llama-server", "-m", f"{name}/model.gguf"]


def test_the_folder_above_a_new_one_is_no_new_one(tmp_path):
    save_checkpoint(tmp_path / "best.pt", "bytes")
    with pytest.raises(UserError, match="exists already"):
        export.export(ExportConfig(checkpoint=str(tmp_path / "best.pt"), out_dir=str(tmp_path / "new" / "..")))
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
    assert "\\udce8:" in result.stdout and "\nLoad it" in result.stdout
    assert "| started from | a model on the trainer's computer, `mod?l` |" in (out_dir / "README.md").read_text(
        encoding="utf-8"
    )


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
