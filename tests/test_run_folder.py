"""The folder of a run: nothing in it is trained over or deleted unasked, and one training uses it at a time."""

import dataclasses
import errno
import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
from runs import assert_same_end, metrics, stop_at, tiny

import train
from internals import checkpoint
from internals.resume import resume_settings
from internals.run import Run
from internals.run_folder import check_source_stays
from internals.start import UserError
from model import GPT

pytestmark = pytest.mark.usefixtures("quick")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


# ----------------------------------------------------------------------------------------------------------------------
# Overwriting


def test_a_run_is_never_overwritten_unasked(data_dir, tmp_path, straight):
    with pytest.raises(UserError, match="there is no run in"):
        train.train(tiny(data_dir, tmp_path / "none", resume=True))
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match=f"one of these: .*{re.escape(str(straight))}"):  # a forgotten --preset
        train.train(tiny(data_dir, straight.parent / "none", resume=True))
    with pytest.raises(UserError, match=f"is a file; give a folder, such as {re.escape(str(straight))}$"):
        train.train(tiny(data_dir, straight / "last.pt", resume=True))
    with pytest.raises(UserError, match=f"is a file; give a folder, such as {re.escape(str(straight))}$"):
        resume_settings(dataclasses.replace(tiny(data_dir, straight / "best.pt"), eval_only=True))
    train.train(tiny(data_dir, tmp_path, max_iters=1))
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"holds a run \(last.pt\).*--resume.*--overwrite"):
        train.train(tiny(data_dir, tmp_path))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    (tmp_path / "last.pt").unlink()  # to save room, say
    with pytest.raises(UserError, match=r"holds a model \(best.pt\)"):
        train.train(tiny(data_dir, tmp_path))
    train.train(tiny(data_dir, tmp_path, overwrite=True))
    assert_same_end(tmp_path, straight)


@pytest.mark.parametrize("fault", ["damaged shard", "nan", "out of memory"])
def test_a_run_is_overwritten_only_when_the_new_one_has_passed_an_evaluation(
    data_dir, tmp_path, monkeypatch, straight, fault
):
    def out_of_memory(*args):
        raise MemoryError

    shutil.copytree(straight, tmp_path / "run")
    data = shutil.copytree(data_dir, tmp_path / "data")
    before = files(tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises((UserError, MemoryError)):
        if fault == "damaged shard":
            with open(data / "val_000000.bin", "r+b") as shard:
                shard.seek(1044)
                shard.write(b"\xff\xff")  # not a token
        else:
            patch.setattr(train, "evaluate", out_of_memory if fault == "out of memory" else lambda *args: math.nan)
        train.train(tiny(data, tmp_path / "run", overwrite=True))
    assert files(tmp_path / "run") == before
    train.train(tiny(data_dir, tmp_path / "run", overwrite=True))
    assert_same_end(tmp_path / "run", straight)
    assert metrics(tmp_path / "run") == metrics(straight)


def test_files_that_another_program_holds_open_do_not_stop_overwriting(data_dir, tmp_path, monkeypatch, straight):
    """On Windows they cannot be deleted, but a run replaces them."""
    train.train(tiny(data_dir, tmp_path, max_iters=6))
    unlink = Path.unlink

    def held(path, missing_ok=False):
        if path.name in ("loss.png", "metrics.jsonl"):
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", held)
    train.train(tiny(data_dir, tmp_path, overwrite=True))
    assert_same_end(tmp_path, straight)
    assert metrics(tmp_path) == metrics(straight)


@pytest.mark.parametrize("name", ["best.pt", "last.pt", "."])
def test_overwriting_does_not_delete_the_model_of_init_from(data_dir, tmp_path, straight, name):
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"--init-from .*: --overwrite deletes this model; copy it to another folder"):
        train.train(tiny(data_dir, tmp_path, init_from=str(tmp_path / name), overwrite=True))
    assert files(tmp_path) == before
    shutil.copy(tmp_path / "best.pt", tmp_path / "base.pt")  # this one stays
    train.train(tiny(data_dir, tmp_path, init_from=str(tmp_path / "base.pt"), overwrite=True, max_iters=1))


def test_overwriting_does_not_delete_that_model_under_another_name(tmp_path, monkeypatch):
    """As on a Mac, where `Run` and `run` are one folder, and `os.path.realpath` does not say so."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.pt").touch()
    (tmp_path / "Run").symlink_to(tmp_path / "run")
    monkeypatch.setattr(os.path, "realpath", os.path.abspath)
    for name in ("Run", "Run/best.pt"):
        with pytest.raises(UserError, match="--overwrite deletes this model"):
            check_source_stays(str(tmp_path / name), tmp_path / "run")


def test_a_damaged_model_can_be_overwritten(data_dir, tmp_path):
    train.train(tiny(data_dir, tmp_path, max_iters=1))
    (tmp_path / "last.pt").unlink()
    os.truncate(tmp_path / "best.pt", 1000)
    with pytest.raises(UserError, match=r"holds a model \(best.pt\); delete it with --overwrite"):
        train.train(tiny(data_dir, tmp_path))
    train.train(tiny(data_dir, tmp_path, max_iters=1, overwrite=True))


def test_overwriting_does_not_touch_a_model_of_the_hub_or_of_hugging_face(tmp_path, monkeypatch):
    """Its name may also be that of OUT_DIR, while there is no checkpoint."""
    monkeypatch.chdir(tmp_path)
    check_source_stays("openai-community/gpt2", Path("openai-community/gpt2"))
    Path("hf").mkdir()
    Path("hf/model.safetensors").touch()
    check_source_stays("hf", Path("hf"))
    Path("hf/last.pt").touch()
    with pytest.raises(UserError, match="--overwrite deletes this model"):
        check_source_stays("hf", Path("hf"))


def test_the_curves_of_a_run_are_never_deleted_unasked(data_dir, tmp_path, straight):
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    for name in ("best.pt", "last.pt"):  # moved away, to save room
        (tmp_path / name).unlink()
    for mode in ({}, {"auto_resume": True}):
        with pytest.raises(UserError, match="holds files of a run whose checkpoints are gone"):
            train.train(tiny(data_dir, tmp_path, **mode))
    assert metrics(tmp_path) == metrics(straight)
    train.train(tiny(data_dir, tmp_path, overwrite=True))
    assert_same_end(tmp_path, straight)


# ----------------------------------------------------------------------------------------------------------------------
# Files of other runs and of the user


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("samples.jsonl", None),
        ("samples.jsonl", b'{"colour": "blue"}\n'),
        ("metrics.jsonl", b"my notes\n"),
        ("run.html", None),
        ("run.html", b"my page"),
        ("loss.png", b"a picture"),
    ],
)
def test_what_was_kept_of_a_run_stays(data_dir, tmp_path, straight, name, content):
    """Beside the config.json of a run."""
    shutil.copy(straight / "config.json", tmp_path)
    (tmp_path / name).write_bytes(content or (straight / name).read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for mode in ({}, {"auto_resume": True}):
        with pytest.raises(UserError, match=rf"are gone \({name}\); move them, delete them with --overwrite"):
            train.train(tiny(data_dir, tmp_path, **mode))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    train.train(tiny(data_dir, tmp_path, overwrite=True))
    assert_same_end(tmp_path, straight)


def test_a_config_json_of_another_version_or_a_broken_one(data_dir, tmp_path, straight, capsys):
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["activation"] = "relu2"  # a field that somebody added, and took back
    (tmp_path / "config.json").write_text(json.dumps(config))
    train.train(tiny(data_dir, tmp_path, resume=True))
    assert "finished (20 iterations)" in capsys.readouterr().out
    (tmp_path / "config.json").write_text("{")
    for mode in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match=r"its config\.json does not hold the settings of a run; delete it"):
            train.train(tiny(data_dir, tmp_path, **mode))
    assert (tmp_path / "config.json").read_text() == "{"
    (tmp_path / "config.json").unlink()
    train.train(tiny(data_dir, tmp_path, resume=True))
    assert_same_end(tmp_path, straight)
    train.train(tiny(data_dir, tmp_path, overwrite=True, max_iters=1))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("best.pt", b"somebody's own model"),
        ("last.pt", b"somebody's own"),
        ("config.json", b'{"colour": "blue"}'),
        ("config.json", b"no JSON"),
        ("metrics.jsonl", b'{"iter": 3}\n'),
        ("loss.png", b"a picture"),
        ("last.pt.tmp", b"somebody's own, too"),
    ],
)
@pytest.mark.parametrize("mode", [{}, {"overwrite": True}, {"auto_resume": True}], ids=["new", "overwrite", "auto"])
def test_files_that_no_run_wrote_stay(data_dir, tmp_path, name, content, mode):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "thesis.tex").write_bytes(b"years of work")
    resumes = name == "last.pt" and "auto_resume" in mode
    words = "last.pt: is damaged, or not a checkpoint" if resumes else rf"{name}, not written by train\.py"
    with pytest.raises(UserError, match=words):
        train.train(tiny(data_dir, tmp_path, **mode))
    assert (tmp_path / name).read_bytes() == content
    (tmp_path / name).unlink()
    train.train(tiny(data_dir, tmp_path, max_iters=1, **mode))
    train.train(tiny(data_dir, tmp_path, max_iters=1, overwrite=True))
    assert (tmp_path / "thesis.tex").read_bytes() == b"years of work"


def test_a_run_killed_before_its_first_checkpoint_starts_anew(data_dir, tmp_path, monkeypatch, straight):
    class Killed(BaseException):
        pass

    def stop(*args):
        raise Killed

    for name in ("evaluate", "save"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(train, name, stop)
            train.train(tiny(data_dir, tmp_path))
    assert {"samples.jsonl", "run.html"} <= set(os.listdir(tmp_path))  # of iteration 0: written, but not to be kept
    with monkeypatch.context() as patch, pytest.raises(Killed):  # between best.pt and last.pt of iteration 0
        save = checkpoint.save
        patch.setattr(checkpoint, "save", lambda path, saved: stop() if path.name == "last.pt" else save(path, saved))
        train.train(tiny(data_dir, tmp_path))
    assert (tmp_path / "best.pt").exists() and not (tmp_path / "last.pt").exists()
    train.train(tiny(data_dir, tmp_path))
    assert_same_end(tmp_path, straight)


# ----------------------------------------------------------------------------------------------------------------------
# Two commands in one folder


def test_two_trainings_do_not_share_a_folder(data_dir, tmp_path, monkeypatch):
    def another_begins(*args):
        monkeypatch.setattr(train, "evaluate", evaluate)
        with pytest.raises(UserError, match="another training run is using it"):
            train.train(tiny(data_dir, tmp_path))
        return evaluate(*args)

    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", another_begins)
    train.train(tiny(data_dir, tmp_path, max_iters=1))
    train.train(tiny(data_dir, tmp_path, max_iters=2, resume=True))  # the lock went with the run


def test_a_run_that_ended_meanwhile_is_neither_deleted_nor_set_back(data_dir, tmp_path, monkeypatch, straight):
    """Another command trains in the folder between this one's look at it and its lock."""
    initial_model = train.initial_model

    def another_trained(run: Run) -> GPT:
        shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
        return initial_model(run)

    stop_at(monkeypatch, data_dir, tmp_path, 8)
    monkeypatch.setattr(train, "initial_model", another_trained)
    with pytest.raises(UserError, match="another command has trained there meanwhile; repeat this one"):
        train.train(tiny(data_dir, tmp_path, resume=True))
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match="holds a run"):
        train.train(tiny(data_dir, tmp_path))
    assert_same_end(tmp_path, straight)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EIO])
def test_a_file_system_without_locks_costs_a_warning(data_dir, tmp_path, monkeypatch, straight, capsys, number):
    def refuse(descriptor, blocking):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("internals.files.lock_descriptor", refuse)
    train.train(tiny(data_dir, tmp_path))
    assert capsys.readouterr().err.count("cannot be locked") == 1
    assert_same_end(tmp_path, straight)


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path or mode != os.W_OK)
    run = tiny(data_dir, tmp_path / "new" / "run", max_minutes=60)
    monkeypatch.setattr(train, "fit_minutes", lambda *args: pytest.fail("it is measuring"))
    with pytest.raises(UserError, match=r"--out-dir .*run: .* cannot be written; make it writable"):
        train.train(run)
    train.train(tiny(data_dir, tmp_path / "new", check=True))
    assert "But --out-dir" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_lock_file_that_cannot_be_opened_costs_a_warning(data_dir, tmp_path, straight, capsys):
    (tmp_path / ".lock").mkdir()
    train.train(tiny(data_dir, tmp_path))
    assert capsys.readouterr().err.count("cannot be locked") == 1
    assert_same_end(tmp_path, straight)
