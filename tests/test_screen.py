"""Output fits 80 columns, and a printed command works when it is pasted."""

import dataclasses
import math
import os
import select
import shlex
import struct
import subprocess
import sys
from pathlib import Path, PureWindowsPath

import pytest
import torch
from conftest import REPO, run_script
from test_report import META, state

from config import PRESETS, ExportConfig, GenerateConfig, PrepareConfig, TrainConfig
from internals import report, screen
from internals.cli import parse, with_preset
from internals.machine import Machine
from internals.reference import Reference
from internals.resume import resume_settings
from internals.run import Run
from internals.run_length import resolve_auto
from internals.settings import as_typed

MACHINE = Machine(torch.device("cpu"), torch.float32, "as requested", rank=0, processes=1)

# ----------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.4, "0 s"),
        (59.6, "1 min 00 s"),
        (61, "1 min 01 s"),
        (3_599.6, "1 h 00 min"),
        (86_340, "23 h 59 min"),
        (90_061, "1 day 1 h"),
        (273_600, "3 days 4 h"),
    ],
)
def test_durations(seconds, text):
    assert screen.duration(seconds) == text


def test_rough_durations():
    assert [screen.about(hours * 3600) for hours in (1, 30, 523)] == ["1 hour", "30 hours", "22 days"]
    assert screen.about(1_020) == "17 minutes"


def test_seconds_have_three_digits():
    assert [screen.short_seconds(s) for s in (0.01234, 4.5, 1_234)] == ["0.0123 s", "4.5 s", "20 min 34 s"]


def test_sizes():
    assert [screen.size(n) for n in (1_000, 1_536, 30 * 2**20, 1.5 * 2**30)] == ["1000 B", "2 KiB", "30 MiB", "1.5 GiB"]


def test_sizes_of_files_have_units_that_fit():
    assert [screen.file_size(n) for n in (27_300, 3.14e6, 1.2345e10)] == ["27.3 KB", "3.1 MB", "12.35 GB"]


def test_losses_have_four_digits():
    losses = (0.0123, 2.33, 9.9994, 10.826, 260.26, 12_345_678.9)
    assert [screen.short_loss(loss) for loss in losses] == ["0.012", "2.330", "9.999", "10.83", "260.3", "1.23e+07"]


# ----------------------------------------------------------------------------------------------------------------------
# Lines


def test_text_keeps_all_but_control_characters():
    text = "l’été\u00a0: 5\u202fkm, 日本\u3000語, می\u200cخواهم, क्\u200dष, Wort\u00adteil, 👩\u200d👩\u200d👧\n\tend"
    assert screen.printable(text) == text
    assert screen.printable("a\x1b[31m\x9b\r\0\x7f\ud800z") == "a\ufffd[31m\ufffd\ufffd\ufffd\ufffdz"


def row(iter: int, loss: float, bits: float, train: float | None) -> dict:
    return {"iter": iter, "val_loss": loss, "bits_per_byte": bits, "train_loss": train}


def test_an_evaluation_is_one_line():
    line = screen.evaluation_line(row(100, 2.3298, 3.3631, 2.37), 600, best=True, reference="reference 2.330")
    assert line == "100/600  val 2.330  3.36 bits/byte (best)  train 2.370  reference 2.330"
    assert screen.evaluation_line(row(0, 5.5617, 8.0285, None), 600) == "  0/600  val 5.562  8.03 bits/byte"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("same_text", [True, False])
@pytest.mark.parametrize("best", [True, False])
def test_no_preset_has_an_evaluation_that_is_longer_than_80_columns(preset, same_text, best):
    cfg = with_preset(TrainConfig, preset)
    blind = 1.01 * math.log(50_257)  # an untrained model, a little worse than a guess
    bits = 1.01 * 8  # of text that cannot be compressed
    reference = Reference({cfg.max_iters: blind}, {cfg.max_iters: bits}, same_text, "").beside(cfg.max_iters)
    line = screen.evaluation_line(row(cfg.max_iters, blind, bits, blind), cfg.max_iters, best, reference)
    assert len(line) <= 80 and line.endswith(reference) and ("train" in line) == same_text


def test_long_texts_continue_below_themselves_and_break_at_spaces_alone():
    path = "/a/long-path/" + "x" * 75
    text = screen.lines({"data": f"{path}: 1,048,576,000 tokens " + "of text " * 20})
    first, *rest = text.splitlines()
    assert first == f"data       {path}:" and " ".join(text.split()).count("of text") == 20
    assert rest[0].startswith(" " * 11 + "1,048,576,000 tokens of text of ")
    assert all(line.startswith(" " * 11) and len(line) <= 80 for line in rest)


# ----------------------------------------------------------------------------------------------------------------------
# The bar


@pytest.mark.parametrize("columns", [80, 60, 40, 20])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_bar_fits_with_the_largest_numbers(monkeypatch, capsys, columns, preset):
    cfg = resolve_auto(with_preset(TrainConfig, preset), epoch_tokens=10**9).cfg
    monkeypatch.setattr(screen, "terminal_width", lambda: columns)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = screen.TrainingBar(cfg, cfg.max_iters // 2, is_main=True)
    bar.bar.mininterval = 0
    seconds = 99 * 86_400 / (cfg.max_iters - cfg.max_iters // 2 - 1)
    bar.iteration(10.826, 999_999.4, "MFU 100%", seconds)
    bar.close()
    shown = [part for part in capsys.readouterr().err.replace("\n", "\r").split("\r") if part.strip()]
    assert shown and all(len(part) <= columns for part in shown), shown
    last = shown[-1]
    assert f"{cfg.max_iters // 2 + 1:,}/{cfg.max_iters:,} |" in last
    if columns == 80:
        assert last.endswith("| loss 10.83  999,999 tokens/s  MFU 100%  99 days 0 h left")
    elif columns >= 50:
        assert last.endswith(" left")


def test_the_time_left_counts_the_iterations_and_the_evaluations():
    cfg = dataclasses.replace(TrainConfig(), max_iters=1_000, eval_interval=100)
    bar = screen.TrainingBar(cfg, 0, is_main=False)
    bar.recent.extend([60.0, *[0.5] * 9])  # the first compiles
    bar.iter, bar.evaluation_seconds = 250, 30.0
    assert bar.seconds_left() == 750 * 0.5 + 8 * 30  # at 300, 400, ..., 1,000
    bar.iter = 1_000
    assert bar.seconds_left() == 0


def in_a_terminal(*args, columns: int = 80) -> str:
    """A command's output in a terminal with this many columns."""
    import fcntl
    import pty
    import termios

    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 0, columns, 0, 0))  # it reports 0 rows
    process = subprocess.Popen([sys.executable, *map(str, args)], cwd=REPO, stdin=other, stdout=other, stderr=other)
    os.close(other)
    shown = b""
    try:
        while select.select([main], [], [], 60)[0]:  # within a minute
            shown += os.read(main, 65_536)
    except OSError:  # the process has ended
        pass
    os.close(main)
    try:
        assert process.wait(timeout=60) == 0, shown.decode()
    finally:
        process.kill()
    return shown.decode()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
def test_a_terminal_shows_the_bar_and_nothing_is_wider_than_it(data_dir, tmp_path):
    flags = [
        "--data-dir",
        data_dir,
        "--out-dir",
        tmp_path / "run",
        "--device",
        "cpu",
        "--block-size",
        16,
        "--n-layer",
        1,
    ]
    flags += ["--n-head", 2, "--n-embd", 8, "--tokens-per-iter", 64, "--max-iters", 30, "--eval-interval", 10]
    shown = in_a_terminal("train.py", *flags)
    parts = [part for line in shown.splitlines() for part in line.split("\r")]
    assert any(" |" in part and "| loss " in part and part.endswith(" left") for part in parts), shown
    # Paths and commands stay whole, whatever their length
    wide = [part for part in parts if len(part) > 80 and str(tmp_path) not in part and str(data_dir) not in part]
    assert not wide, wide
    shown = run_script("train.py", *flags, "--overwrite")
    assert shown.returncode == 0 and shown.stderr == "" and "left" not in shown.stdout
    assert shown.stdout.count("/30  val ") == 4 and "\r" not in shown.stdout and "\x1b" not in shown.stdout


# ----------------------------------------------------------------------------------------------------------------------
# The next command


def arguments(command: str) -> list[str]:
    """The arguments of a command line `python SCRIPT ...`, as a shell splits it."""
    python, script, *rest = shlex.split(command)
    assert python == "python" and (REPO / script).is_file()
    return rest


@pytest.fixture
def here(monkeypatch):
    monkeypatch.chdir(REPO)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


FOLDERS = ["checkpoints/demo", "/tmp/my runs/it's", "-dash", "ü"]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_next_commands_say_what_was_meant(here, preset, folder):
    cfg = dataclasses.replace(with_preset(TrainConfig, preset), out_dir=folder, sample_prompt="-it's")
    again = parse(TrainConfig, "", arguments(screen.command("train.py", preset, out_dir=folder, resume=True)))
    assert (again.preset, again.out_dir, again.resume) == (preset, folder, True)
    sampling = parse(GenerateConfig, "", arguments(screen.command_to_generate(Path(folder, "best.pt"), cfg)))
    assert (sampling.checkpoint, sampling.prompt) == (f"{folder}/best.pt", "-it's")
    prepared = dataclasses.replace(with_preset(PrepareConfig, preset), data_dir=folder)
    training = parse(TrainConfig, "", arguments(screen.command_to_train(prepared)))
    assert (training.preset, training.data_dir) == (preset, folder)
    assert training.out_dir == f"checkpoints/{os.path.basename(folder)}"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_presets_own_folders_need_no_flag(here, preset):
    name = [] if preset == "wikipedia" else ["--preset", preset]
    cfg = with_preset(TrainConfig, preset)
    assert arguments(screen.command_to_train(with_preset(PrepareConfig, preset))) == name
    assert arguments(screen.command("train.py", preset, out_dir=cfg.out_dir, resume=True)) == [*name, "--resume"]
    sampling = arguments(screen.command_to_generate(Path(cfg.out_dir, "best.pt"), cfg))
    assert sampling == [*name, "--prompt", "The history of"]


def test_on_windows_the_preset_is_found_by_its_path(here):
    best, cfg = PureWindowsPath("checkpoints/demo/best.pt"), with_preset(TrainConfig, "demo")
    assert str(best) == r"checkpoints\demo\best.pt"
    assert arguments(screen.command_to_generate(best, cfg)) == ["--preset", "demo", "--prompt", "The history of"]


def test_on_windows_commands_are_quoted_for_its_shells(here, monkeypatch):
    """cmd.exe does not know single quotes, and `&` ends a command in both shells."""
    monkeypatch.setattr(Path, "cwd", lambda: REPO)  # no Path can be made under this name of the system
    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        resuming = screen.command("train.py", "demo", out_dir=r"my runs\1", resume=True)
        sampling = screen.command("generate.py", "demo", checkpoint=r"runs\a\best.pt", prompt="The history of")
        typed = [
            as_typed(word) for word in ("The history of", "R&D", "(a)", "it's", "50%", "a;$b\\", 'a"&', "", r"C:\a=1.5")
        ]
    assert resuming == r'python train.py --preset demo --out-dir "my runs\1" --resume'
    assert sampling == r'python generate.py --preset demo --checkpoint runs\a\best.pt --prompt "The history of"'
    assert typed == [
        '"The history of"', '"R&D"', '"(a)"', '"it\'s"', '"50%"', r'"a;$b\\"', r'"a\"&"', '""', r"C:\a=1.5",
    ]  # fmt: skip


def test_elsewhere_the_script_is_named_in_full(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert screen.command("train.py", "demo") == shlex.join(["python", str(REPO / "train.py"), "--preset", "demo"])


def test_under_torchrun_so_does_the_next_run(here, monkeypatch):
    for not_torchruns in ("", "x", "8"):
        monkeypatch.setenv("WORLD_SIZE", not_torchruns)
        assert screen.command("train.py", "demo").startswith("python ")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert screen.command("train.py", "demo") == "torchrun --standalone --nproc-per-node 8 train.py --preset demo"
    assert screen.command("generate.py", "demo") == "python generate.py --preset demo"
    for name, value in (("WORLD_SIZE", "16"), ("GROUP_WORLD_SIZE", "2"), ("GROUP_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "first")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert report.continuing(TrainConfig(), "Continue") == (
        "Continue (on each machine with its own --node-rank): torchrun --nnodes 2 --node-rank 0 --nproc-per-node 8 "
        "--master-addr first --master-port 29500 train.py --resume"
    )


def ending(iter: int, **changes) -> list[str]:
    cfg = dataclasses.replace(with_preset(TrainConfig, "demo"), **changes)
    end = dataclasses.replace(state(iter, seconds=121), best_val_loss=1.5066)
    return report.ending(Run(cfg, META, MACHINE, None, None), end).splitlines()


def test_every_end_says_what_comes_next(here, tmp_path, monkeypatch):
    monkeypatch.setattr(screen, "REPO", tmp_path)
    monkeypatch.chdir(tmp_path)
    out_dir = tmp_path / "checkpoints" / "demo"
    out_dir.mkdir(parents=True)
    (out_dir / "loss.png").touch()
    (out_dir / "run.html").touch()
    assert ending(95) == [
        "Stopped at iteration 95, all saved.",
        "Continue: python train.py --preset demo --resume",
    ]
    assert ending(600) == [
        "Done in 2 min 01 s of training. Best validation loss 1.507 (2.17 bits/byte).",
        "Model: checkpoints/demo/best.pt",
        "Curves: checkpoints/demo/loss.png",
        "Page: checkpoints/demo/run.html",
        "Try: python generate.py --preset demo --prompt 'The history of'",
    ]
    for done, words in ((1, "1 iteration"), (300, "300 iterations")):  # 600 is the preset's number, but not last.pt's
        finished = Run(with_preset(TrainConfig, "demo"), META, MACHINE, None, None, resumed_at=done)
        assert report.already_finished(finished).splitlines() == [
            f"The run in checkpoints/demo is finished ({words}).",
            f"Extend it: python train.py --preset demo --resume --max-iters {2 * done}",
        ]


def test_a_pasted_command_resumes_the_run_with_its_data_and_settings(data_dir, tmp_path):
    folder = tmp_path / "it's a run"
    flags = ["--data-dir", data_dir, "--out-dir", folder, "--device", "cpu", "--block-size", 16, "--n-layer", 1]
    flags += ["--n-head", 2, "--n-embd", 8, "--tokens-per-iter", 64, "--max-iters", 4, "--eval-interval", 2]
    first = run_script("train.py", *flags)
    assert first.returncode == 0, first.stderr
    (sampling,) = (line.removeprefix("Try: ") for line in first.stdout.splitlines() if line.startswith("Try: "))
    text = run_script("generate.py", *shlex.split(sampling)[2:], "--max-new-tokens", 4)
    assert text.returncode == 0 and text.stdout.startswith("The history of"), text.stderr
    again = run_script("train.py", *flags, "--resume")
    (longer,) = (line.removeprefix("Extend it: ") for line in again.stdout.splitlines() if line.startswith("Extend"))
    args = shlex.split(longer)[2:]
    cfg = resume_settings(parse(TrainConfig, "", args), args).cfg
    assert (cfg.data_dir, cfg.out_dir, cfg.max_iters, cfg.model.n_embd) == (str(data_dir), str(folder), 8, 8)
    done = run_script("train.py", *args)
    assert done.returncode == 0 and "8/8  val " in done.stdout, done.stderr


def test_check_names_the_run_itself(monkeypatch, here):
    monkeypatch.setattr(sys, "argv", ["train.py", "--check", "--out-dir", "my runs/a"])
    assert screen.given_command(without="--check") == "python train.py --out-dir 'my runs/a'"


def test_a_small_model_is_not_one_of_0_million_parameters():
    assert [screen.rounded(count) for count in (48_000, 1_071_872, 29_985_408)] == [
        "48,000",
        "1.1 million",
        "30.0 million",
    ]


def test_exported_models_come_with_the_way_to_load_them(tmp_path):
    import export
    from internals.tokenizer import load_tokenizer

    assert set(screen.COMMANDS) == {path.name for path in REPO.glob("*.py")} - {"config.py", "model.py"}
    cfg = ExportConfig(out_dir=str(tmp_path / "it's 🦉"), format="gguf")
    assert shlex.split(export.loading_command(cfg, load_tokenizer("bytes"), 64))[-1] == f"{tmp_path}/it's 🦉/model.gguf"
    python, flag, code = shlex.split(
        export.loading_command(dataclasses.replace(cfg, format="hf"), load_tokenizer("bytes"), 64)
    )
    compile(code, "", "exec")
    assert (python, flag) == ("python", "-c") and f'"{tmp_path}/it\'s 🦉"' in code


def test_on_windows_the_way_to_load_an_export_needs_no_quotes_inside_quotes(monkeypatch):
    import export
    from internals.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("bytes")
    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        command = export.loading_command(ExportConfig(out_dir=r"my models\a"), tokenizer, 64)
        other = export.loading_command(ExportConfig(out_dir=r"my models\a", format="gguf"), tokenizer, 64)
    code = command.removeprefix('python -c "').removesuffix('"')
    compile(code, "", "exec")
    assert '"' not in code and repr(r"my models\a") in code
    assert other == r'llama-server -m "my models\a/model.gguf"'
