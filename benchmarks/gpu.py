"""All figures that need a GPU, in parts of less than 8 minutes each on an RTX 4090 (estimated) or a faster card.

    python benchmarks/gpu.py --source DIR --nanogpt DIR                       all remaining parts, in order
    python benchmarks/gpu.py --source DIR --nanogpt DIR --part matrix-rate    some of them

DIR are a folder of Wikipedia's parquet files and a checkout of nanoGPT. The results of a part are kept in
`--out`/CARD/NAME.json, and a part that is there is not measured again, unless it lacks a competitor or is a race with
other `--tokens`; delete the file to measure it anew. Races with another `--race-batch-size` need another `--out`. Training
runs stop after `--piece-minutes`, and the next start continues them. A run of nanoGPT stops only at its next evaluation,
up to an eighth of its race later: on a card that trains at less than 160,000 tokens/s, more than two minutes.
`--out`/CARD/summary.md shows all figures there are. One program at a time is on the card, so the default shape needs no
more than its hungriest competitor.

It needs requirements.txt, but not `datasets` and `huggingface_hub`; transformers for the comparisons; and GPT-2's
vocabulary, from the network or from TIKTOKEN_CACHE_DIR. For an image that has PyTorch but lacks tyro,
`pip install --no-deps --target DIR tyro docstring-parser typeguard` and PYTHONPATH=DIR are enough. `--small` runs the
parts on a CPU, tiny, in minutes: all but `kernels`, which needs a card, and `generating`, which is not tiny.
"""

import dataclasses
import datetime
import json
import multiprocessing
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gpu_steps
import gpu_summary
import torch
import tyro
from common import REPO

from config import ModelConfig, TrainConfig
from internals.cli import with_preset
from internals.files import write_json, write_text
from internals.report import validation_row
from internals.shards import read_meta
from internals.start import UserError, first_line, run
from model import GPT

BATCH = {"wikipedia": 64, "wikipedia-150m": 8}  # sequences that all competitors fit into 24 GB
EPOCHS = 4  # at most; with more, the loss falls less than with new text
EVALUATIONS = 8  # of a training run
SHARES = {"race-ours-half": 2, "race-ours-third": 3}  # races on a share of the iterations of `race-ours`
TRIALS = {  # races with other settings
    "race-ours-1e-3": ("--learning-rate", "1e-3", "--muon-lr-scale", "4"),  # another rate for AdamW, the same for Muon
    "race-ours-8e-3": ("--learning-rate", "8e-3", "--muon-lr-scale", "0.5"),
    "race-ours-momentum": ("--muon-momentum", "0.9"),
}
SMALL_RUN = (
    "--device cpu --n-layer 1 --n-head 2 --n-embd 32 --n-inner 64 --block-size 64 --tokens-per-iter 1024 "
    "--eval-tokens 2048 --batch-size 4"
)


@dataclass(frozen=True)
class Gpu:
    source: str | None = None  # what prepare_data.py --source takes; needed until the part `data` is done
    nanogpt: str | None = None  # folder of a checkout of nanoGPT; None: without its figures
    part: tuple[str, ...] = ()  # only these parts; none: all that are left
    tokens: int = 150_000_000  # training tokens of a race, at most; never more than 4 epochs of the text
    race_batch_size: int = BATCH["wikipedia"]  # in a micro-step of the races; 256 suit an H200 (nanoGPT: 31 GB)
    piece_minutes: float = 6.0  # minutes of training per start; the next start continues
    out: str = "checkpoints/gpu"  # folder for data, runs and figures
    small: bool = False  # tiny, on the CPU, to see that the parts run

    @property
    def device(self) -> str:
        return "cpu" if self.small else "cuda"

    @property
    def data_dir(self) -> Path:
        return Path(self.out).absolute() / "data"


class Failed(Exception):
    """A part failed; the message says why. The other parts still run."""


# A part's figures, as they are written to its file; None: a training run that is not finished
Figures = dict[str, Any] | None


def main() -> None:
    args = tyro.cli(Gpu, description=__doc__)
    try:
        machine = in_a_process(describe_machine, args.device)
    except Failed as error:
        raise UserError(f"{first_line(error)}: PyTorch finds no card here; --small tries the parts on a CPU") from error
    folder = Path(args.out).absolute() / re.sub(r"\W+", "-", machine["card"])
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in choose(args, folder):
        measure = parts(args, folder).get(name)  # None: the part `data` has shown that the default run is race-ours
        if measure is None or is_done(args, folder, name):
            continue
        print(f"\n{progress(args, folder)}\n== {name}", flush=True)
        begin = time.perf_counter()
        try:
            figures = measure()
        except Failed as error:
            print(f"{name}: {error}", flush=True)
            failed.append(name)
            continue
        if figures is not None:
            taken = {"seconds": time.perf_counter() - begin, "date": datetime.date.today().isoformat()}
            write_json(folder / f"{name}.json", {**machine, **taken, "figures": figures})
            if figures.get("missing"):
                failed.append(name)
        write_text(folder / "summary.md", gpu_summary.markdown(kept(folder), machine))
    print(f"\n{progress(args, folder)}\nAll figures: {folder / 'summary.md'}")
    if failed:
        raise UserError(f"{', '.join(failed)}: failed, see above; start again to retry them")


def parts(args: Gpu, folder: Path) -> dict[str, Callable[[], Figures]]:
    """Name -> the function that measures it, in the order of measuring."""
    found: dict[str, Callable[[], Figures]] = {
        "data": partial(data, args),
        "matrix-rate": partial(matrix_rate, args),
        "loss-eager": partial(loss, args, "--no-compile"),
        "loss-compiled": partial(loss, args, "--compile"),
    }
    # Two turns far apart, to see how much a figure varies. A card gets warm and then slower: in the second turn the
    # competitors run in reverse order
    for turn, order in (1, ()), (2, ("--reverse",)):
        for preset in BATCH:
            found[f"speed-{preset}-{turn}"] = partial(speed, args, folder, preset, BATCH[preset], *order)
    found["speed-wikipedia-256"] = partial(speed, args, folder, "wikipedia", 256)  # a whole iteration in a micro-step
    for preset in BATCH:
        found[f"optimizer-{preset}"] = partial(optimizer, args, preset)
    if not args.small:
        found["kernels"] = partial(kernels, args)
        found["generating"] = generating
    for rate in ("6e-4", "1e-3") if args.nanogpt else ():
        found[f"race-nanogpt-{rate}"] = partial(nanogpt_run, args, folder, f"race-nanogpt-{rate}", rate)
    for name in ("race-ours", *SHARES):
        found[name] = partial(training_run, args, folder, name)
    for name, flags in TRIALS.items():
        found[name] = partial(training_run, args, folder, name, *flags)
    prepared = (args.data_dir / "meta.json").exists()
    if not prepared or length(args, "default-run") > length(args, "race-ours"):  # else it is race-ours
        found["default-run"] = partial(training_run, args, folder, "default-run")
    return found


def choose(args: Gpu, folder: Path) -> list[str]:
    names = list(parts(args, folder))
    if unknown := set(args.part) - set(names):
        raise UserError(f"--part {' '.join(unknown)}: the parts are {' '.join(names)}")
    return [name for name in names if not args.part or name in args.part]


def is_done(args: Gpu, folder: Path, name: str) -> bool:
    """Whether a part has all figures that are asked for now: of every competitor, and of a race of this length."""
    file = folder / f"{name}.json"
    if not file.exists():
        return False
    figures = json.loads(file.read_text(encoding="utf-8"))["figures"]
    if figures.get("missing") or (args.nanogpt and not figures.get("nanogpt", True)):
        return False
    return "max_iters" not in figures or figures["max_iters"] == length(args, name)


def progress(args: Gpu, folder: Path) -> str:
    """The parts that are done, and those that are left."""
    done = {name: is_done(args, folder, name) for name in parts(args, folder)}
    names = {state: [name for name, there in done.items() if there is state] for state in (True, False)}
    return f"Done: {', '.join(names[True]) or 'nothing'}\nLeft: {', '.join(names[False]) or 'nothing'}"


def kept(folder: Path) -> dict[str, dict[str, Any]]:
    """The contents of all parts' files, by name, oldest first."""
    files = sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime)
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


# ----------------------------------------------------------------------------------------------------------------------
# Processes: this one never touches the card, so that a part has it alone


def in_a_process(function: Callable, *args: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result()
        except (RuntimeError, AssertionError) as error:  # out of memory, no card, no CUDA in this PyTorch
            raise Failed(str(error)) from error


def script(*command: object) -> str:
    """Run a script of this repository. Shows its output as it arrives, and returns it."""
    command = [sys.executable, "-u", *map(str, command)]
    print("$", shlex.join(command), flush=True)
    lines = []
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise Failed(f"exit status {process.returncode}")
    return "".join(lines)


def describe_machine(device: str) -> dict[str, str]:
    driver = "none"
    if device == "cuda":
        try:
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError):
            driver = "unknown (no nvidia-smi)"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPO, capture_output=True, text=True)
    return {
        "card": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
    }


# ----------------------------------------------------------------------------------------------------------------------
# Parts that measure


def data(args: Gpu) -> Figures:
    """Token shards for the training runs."""
    if args.source is None and not (args.data_dir / "meta.json").exists():
        raise UserError("--source: the part `data` needs it, a folder of Wikipedia's parquet files")
    if args.source is not None:
        limit = ("--max-tokens", 300_000) if args.small else ()
        script("prepare_data.py", "--source", args.source, "--data-dir", args.data_dir, *limit)
    splits = read_meta(args.data_dir)["splits"]
    return {split: splits[split]["tokens"] for split in ("train", "val")}


def matrix_rate(args: Gpu) -> Figures:
    return {"flops": in_a_process(gpu_steps.matrix_rate, args.device, 512 if args.small else 8192)}


def loss(args: Gpu, compiled: str) -> Figures:
    """The output head and its loss, in chunks of several sizes and the plain way."""
    chunks = [2**22] if args.small else [2**n for n in (25, 26, 27, 28, 29)]
    rows = 256 if args.small else 16_384
    options = ("--device", args.device, "--rows", rows, compiled, "--logits-at-once", *chunks)
    return {"output": script("benchmarks/loss.py", *options)}


def speed(args: Gpu, folder: Path, preset: str, batch_size: int, *order: str) -> Figures:
    """Tokens/s and peak memory of ours, transformers and nanoGPT, one after another."""
    shape, file = with_preset(ModelConfig, preset), folder / "speed.tmp"
    cfg = with_preset(TrainConfig, preset)
    rounds = max(5, 20 * TrainConfig().tokens_per_iter // cfg.tokens_per_iter)
    options = ("--batch-size", 1, "--rounds", 1, "--n-layer", 1) if args.small else (
        "--batch-size", batch_size, "--rounds", rounds
    )  # fmt: skip
    flags = ("--device", args.device, "--preset", preset, "--tokens-per-iter", cfg.tokens_per_iter, "--out", file)
    try:
        script("benchmarks/train.py", *flags, *options, *order, *with_nanogpt(args))
    except Failed:
        if not file.exists():  # else some failed, and the others have figures
            raise
    found = json.loads(file.read_text())
    file.unlink()
    with torch.device("meta"):
        flops = GPT(dataclasses.replace(shape, n_layer=1) if args.small else shape).flops_per_token()
    return {
        "results": {name: result for name, result in found["results"].items() if result},
        "out_of_memory": [name for name, result in found["results"].items() if not result],
        "missing": found["missing"],
        "nanogpt": bool(args.nanogpt),
        "flops_per_token": flops,
        "batch_size": options[1],
        "run_tokens": cfg.max_iters * cfg.tokens_per_iter,
    }


def kernels(args: Gpu) -> Figures:
    """The longest kernels of an iteration of ours and of nanoGPT."""
    options = ("--device", "cuda", "--batch-size", BATCH["wikipedia"], "--rounds", 3, "--kernels")
    output = script("benchmarks/train.py", *options, *with_nanogpt(args), "--only", "ours", "nano")
    return {"output": output, "nanogpt": bool(args.nanogpt)}


def with_nanogpt(args: Gpu) -> tuple[str, ...]:
    return ("--nanogpt", args.nanogpt) if args.nanogpt else ()


def generating() -> Figures:
    return {"output": script("benchmarks/generate.py")}


def optimizer(args: Gpu, preset: str) -> Figures:
    """A step of Muon and of AdamW on the preset's shape: seconds, FLOP of its matrix products, kernels launched."""
    found = {}
    for name in ("muon", "adamw"):
        found[name] = in_a_process(gpu_steps.step_time, args.device, preset, name, args.small)
        if not args.small:
            try:
                found[name]["launches"] = in_a_process(gpu_steps.step_launches, preset, name)
            except Failed as error:  # the profiler needs rights that not every machine gives
                print(f"{preset}, {name}: launches not counted ({first_line(error)})", flush=True)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Training runs, in pieces


def length(args: Gpu, name: str) -> int:
    """Iterations of a training run: of the default run the preset's 16,000, of a race what `--tokens` allows; fewer if
    the text is short."""
    if args.small:
        return 24 if name == "default-run" else 16 // SHARES.get(name, 1)
    cfg = TrainConfig()
    available = EPOCHS * read_meta(args.data_dir)["splits"]["train"]["tokens"] // cfg.tokens_per_iter
    if name == "default-run":
        return min(cfg.max_iters, available)
    return min(cfg.max_iters, available, args.tokens // cfg.tokens_per_iter) // SHARES.get(name, 1)


def run_flags(args: Gpu, max_iters: int) -> list[str]:
    small = SMALL_RUN.split() if args.small else ["--device", "cuda", "--batch-size", str(args.race_batch_size)]
    return [*small, "--max-iters", str(max_iters)]


def training_run(args: Gpu, folder: Path, name: str, *flags: str) -> Figures:
    """A piece of a run of train.py. SIGTERM ends a piece: train.py then saves, and --auto-resume continues."""
    max_iters = length(args, name)
    out_dir = folder / "runs" / f"{name}-{max_iters}"  # with other --tokens it is another run
    interval = str(max(1, max_iters // EVALUATIONS))
    command = [
        sys.executable, "train.py", "--auto-resume", "--data-dir", str(args.data_dir), "--out-dir", str(out_dir),
        *run_flags(args, max_iters), "--eval-interval", interval, *flags,
    ]  # fmt: skip
    print("$", shlex.join(command), flush=True)
    with subprocess.Popen(command, cwd=REPO) as process:
        try:
            process.wait(60 * args.piece_minutes)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            process.wait()  # it got the Ctrl-C, too, and saves
            raise
    if process.returncode:
        raise Failed(f"exit status {process.returncode}")
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = [row for row in rows if "val_loss" in row]
    if rows[-1]["iter"] < max_iters:
        print(
            f"{name}: stopped at iteration {rows[-1]['iter']:,} of {max_iters:,}; started again, it continues",
            flush=True,
        )
        return None
    curve = [(row["tokens"], row["seconds"], row["val_loss"]) for row in evaluations]
    return {"curve": curve, "bits_per_byte": evaluations[-1]["bits_per_byte"], "max_iters": max_iters}


def nanogpt_run(args: Gpu, folder: Path, name: str, rate: str) -> Figures:
    """A piece of a run of nanoGPT's recipe, on the same number of tokens as `race-ours`."""
    max_iters = length(args, name)
    state, curve_file = (folder / "runs" / f"{name}-{max_iters}{ending}" for ending in (".pt", ".curve"))
    state.parent.mkdir(exist_ok=True)
    flags = run_flags(args, max_iters)
    script(
        "benchmarks/race.py", "--data-dir", args.data_dir, "--nanogpt", args.nanogpt, f"--nanogpt-run=--learning-rate {rate}",
        f"--shape={shlex.join(flags)}", "--evaluations", EVALUATIONS, "--state", state,
        "--minutes", args.piece_minutes, "--out", curve_file,
    )  # fmt: skip
    ((_, curve),) = json.loads(curve_file.read_text()).items()
    if len(curve) < EVALUATIONS:
        return None
    bits = validation_row(curve[-1][2], read_meta(args.data_dir))["bits_per_byte"]
    return {"curve": curve, "bits_per_byte": bits, "max_iters": max_iters}


if __name__ == "__main__":
    run(main)
