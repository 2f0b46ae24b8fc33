"""Checkpoints are written whole or not at all, and loading one never runs code or ends in a traceback."""

import errno
import os
import pickle
import sys

import pytest
import tiktoken
import torch

from config import ModelConfig
from internals import checkpoint
from internals.start import UserError
from model import GPT

CONFIG = ModelConfig(n_layer=1, n_head=2, n_embd=16, n_inner=32, block_size=8, vocab_size=257)


def content(**changes) -> dict:
    return {
        "format": 1, "model": GPT(CONFIG).state_dict(), "config": {"model": vars(CONFIG)}, "tokenizer": "bytes",
        "iter": 3, "tokens": 30, "val_loss": 5.0, **changes,
    }  # fmt: skip


def test_a_model_comes_back_as_it_was(tmp_path):
    saved = content()
    checkpoint.save(tmp_path / "new" / "best.pt", saved)
    model = checkpoint.build_model(checkpoint.load(tmp_path / "new" / "best.pt"))
    assert model.config == CONFIG
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in saved["model"].items())
    assert os.listdir(tmp_path / "new") == ["best.pt"]


@pytest.mark.parametrize("room", [0, 1_000, 20_000])
def test_a_full_disk_keeps_the_one_before(tmp_path, room):
    """The system's limit on a file's size makes a write fail halfway, as a full disk does."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    path = tmp_path / "last.pt"
    checkpoint.save(path, content())
    before = path.read_bytes()
    assert len(before) > 20_000
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(
            UserError,
            match=r"last.pt: could not be written \(File too large\); make room; what was saved before is kept",
        ):
            checkpoint.save(path, content(iter=4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not be written"):
        checkpoint.save(tmp_path / "file" / "last.pt", content())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a file's name is always Unicode")
@pytest.mark.parametrize("mmap", [True, False])
def test_a_folder_whose_name_is_not_utf_8(tmp_path, mmap):
    path = tmp_path / os.fsdecode(b"caf\xe9") / "last.pt"
    checkpoint.save(path, content())
    assert checkpoint.load_last(path, mmap)["iter"] == 3


def test_a_drive_without_mmap_is_read_all_the_same(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "last.pt", content())
    load = torch.load

    def without_mmap(path, mmap=False, **options):
        if mmap:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return load(path, **options)

    monkeypatch.setattr(torch, "load", without_mmap)
    assert checkpoint.load(tmp_path / "last.pt", mmap=True)["iter"] == 3


def test_a_file_that_is_not_a_checkpoint_is_named(tmp_path):
    path = tmp_path / "best.pt"
    with pytest.raises(UserError, match="there is no checkpoint"):
        checkpoint.load(path)
    checkpoint.save(path, content())
    whole = path.read_bytes()
    for damaged in (b"", b"text", whole[: len(whole) // 10], whole[: len(whole) // 2], whole[:-1], b"\x80\x02."):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged"):
            checkpoint.load(path)
    for value, message in (
        ([1, 2], "is not a checkpoint written by this project"),
        ({"model": {}}, "is not a checkpoint written by this project"),
        ({"format": 2}, "has checkpoint format 2, but this version reads 1"),
        ({"format": 1, "model": {}, "config": {}}, r"is damaged \(missing: iter, tokenizer, tokens, val_loss\)"),
    ):
        torch.save(value, path)
        with pytest.raises(UserError, match=message):
            checkpoint.load(path)


def test_flipped_bits_are_damage(tmp_path):
    """In a weight, which no other check would notice."""
    path, saved = tmp_path / "best.pt", content()
    checkpoint.save(path, saved)
    whole = bytearray(path.read_bytes())
    weight = saved["model"]["transformer.h.0.mlp.c_fc.weight"].numpy().tobytes()
    for place in (0, len(weight) // 2, len(weight) - 1):
        damaged = whole.copy()
        damaged[whole.index(weight) + place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"best.pt: is damaged, or not a checkpoint written by this project; name"):
            checkpoint.load(path)
        assert checkpoint.load(path, mmap=True)["iter"] == 3  # a look at the settings does not read the weights


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("protocol", ["zip", "legacy", "pickle"])
def test_code_in_a_checkpoint_is_not_executed(tmp_path, protocol, mmap):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    path = tmp_path / "best.pt"
    if protocol == "pickle":
        path.write_bytes(pickle.dumps(content(model=Code())))
    else:
        torch.save(content(model=Code()), path, _use_new_zipfile_serialization=protocol == "zip")
    with pytest.raises(UserError, match="is damaged, or not a checkpoint"):
        checkpoint.load(path, mmap)
    assert not (tmp_path / "executed").exists()


def test_weights_that_do_not_fit_their_configuration():
    for changes, words in (
        ({"config": {"model": vars(ModelConfig())}}, "its weights do not fit its configuration"),
        ({"model": {}}, "its weights do not fit its configuration"),
        ({"config": {"model": {"n_layer": 1, "colour": "red"}}}, "its model's configuration is damaged"),
        ({"config": {}}, "its model's configuration is damaged"),
    ):
        with pytest.raises(UserError, match=words):
            checkpoint.build_model(content(**changes))


def test_a_model_is_loaded_with_its_tokenizer_ready_to_generate(tmp_path):
    saved = content()
    checkpoint.save(tmp_path / "best.pt", saved)
    state = torch.get_rng_state()
    model, tokenizer, loaded = checkpoint.load_model(tmp_path / "best.pt")
    assert torch.equal(torch.get_rng_state(), state)  # no weights were drawn only to be replaced
    assert all(torch.equal(value, saved["model"][name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert (tokenizer.name, loaded["iter"]) == ("bytes", 3)


def test_a_model_and_a_tokenizer_that_do_not_belong_together(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "best.pt", content())
    one_token = tiktoken.Encoding("bytes", pat_str="a", mergeable_ranks={b"a": 0}, special_tokens={})
    monkeypatch.setattr(checkpoint, "load_tokenizer", lambda name: one_token)
    with pytest.raises(UserError, match=r"best.pt: is damaged: its model has 257 tokens, its tokenizer \(bytes\) 1"):
        checkpoint.load_model(tmp_path / "best.pt")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"tokenizer": "runes"}, "'runes'"),
        ({"config": {"model": vars(ModelConfig(n_layer=2))}}, "do not fit"),
        ({"format": 2}, "format 2"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path, change, words):
    checkpoint.save(tmp_path / "best.pt", content(**change))
    with pytest.raises(UserError, match=words) as caught:
        checkpoint.load_model(tmp_path / "best.pt")
    assert "\n" not in str(caught.value)


def test_an_empty_file_is_called_empty(tmp_path):
    (tmp_path / "best.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"best\.pt \(an empty file\): is damaged"):
        checkpoint.load(tmp_path / "best.pt")
