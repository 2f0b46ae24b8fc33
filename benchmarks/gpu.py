"""All figures that need a GPU, in parts of less than 8 minutes each.

    python benchmarks/gpu.py --source DIR --nanogpt DIR                       all remaining parts, in order
    python benchmarks/gpu.py --source DIR --nanogpt DIR --part matrix-rate    some of them

DIR are a folder of Wikipedia's parquet files and a checkout of nanoGPT. The results of a part are kept in
`--out`/CARD/NAME.json, and a part that is there is not measured again; delete the file to measure it anew. Training runs
stop after `--piece-minutes`, and the next start continues them. `--out`/CARD/summary.md shows all figures there are.
One program at a time is on the card, so the default shape needs no more than its hungriest competitor.

It needs requirements.txt, but not `datasets` and `huggingface_hub`; transformers for the comparisons; and GPT-2's
vocabulary, from the network or from TIKTOKEN_CACHE_DIR. For an image that has PyTorch but lacks tyro,
`pip install --no-deps --target DIR tyro docstring-parser typeguard` and PYTHONPATH=DIR are enough. `--small` runs every
part on a CPU, tiny, in minutes.
"""

import dataclasses
import datetime
import json
import multiprocessing
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gpu_summary
import torch
import tyro
from common import REPO
from torch.utils.flop_counter import FlopCounterMode

from config import ModelConfig, TrainConfig
from internals.cli import with_preset
from internals.files import write_json, write_text
from internals.optimizer import make_optimizer
from internals.report import validation_row
from internals.shards import read_meta
from internals.start import UserError, first_line, run
from model import GPT

BATCH = {"wikipedia": 64, "wikipedia-150m": 8}  # sequences that all competitors fit into 24 GB
EPOCHS = 4  # at most; with more, the loss falls less than with new text
EVALUATIONS = 8  # of a training run
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
    piece_minutes: float = 6.0  # minutes of training per start; the next start continues
    out: str = "checkpoints/gpu"  # folder for data, runs and figures
    small: bool = False  # tiny, on the CPU, to see that every part runs

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
        raise UserError(
            f"{first_line(error)}: PyTorch finds no card here; --small tries every part on a CPU"
        ) from error
    folder = Path(args.out).absolute() / re.sub(r"\W+", "-", machine["card"])
    folder.mkdir(parents=True, exist_ok=True)
    failed, chosen = [], choose(args, folder)
    for name in chosen:
        if (folder / f"{name}.json").exists():
            continue
        print(f"\n{progress(args, folder)}\n== {name}", flush=True)
        begin = time.perf_counter()
        try:
            figures = parts(args, folder)[name]()
        except Failed as error:
            print(f"{name}: {error}", flush=True)
            failed.append(name)
            continue
        if figures is not None:
            taken = {"seconds": time.perf_counter() - begin, "date": datetime.date.today().isoformat()}
            write_json(folder / f"{name}.json", {**machine, **taken, "figures": figures})
        write_text(folder / "summary.md", gpu_summary.markdown(kept(folder), machine))
    print(f"\n{progress(args, folder)}\nAll figures: {folder / 'summary.md'}")
    if failed:
        raise UserError(f"{', '.join(failed)}: failed, see above; start again to retry them")


def parts(args: Gpu, folder: Path) -> dict[str, Callable[[], Figures]]:
    """Name -> the function that measures it, in the order of measuring."""
    found: dict[str, Callable[[], Figures]] = {
        "data": partial(data, args),
        "matrix-rate": lambda: {"flops": in_a_process(matrix_rate, args.device, 512 if args.small else 8192)},
        "loss-eager": partial(loss, args, "--no-compile"),
        "loss-compiled": partial(loss, args, "--compile"),
    }
    for turn in (1, 2):  # far apart, to see how much a figure varies
        for preset in BATCH:
            found[f"speed-{preset}-{turn}"] = partial(speed, args, folder, preset, BATCH[preset])
    found["speed-wikipedia-256"] = partial(speed, args, folder, "wikipedia", 256)  # a whole iteration in a micro-step
    if not args.small:
        options = ("--device", "cuda", "--batch-size", BATCH["wikipedia"], "--rounds", 3, "--kernels")
        nanogpt = ("--nanogpt", args.nanogpt) if args.nanogpt else ()
        found["kernels"] = lambda: {
            "output": script("benchmarks/train.py", *options, *nanogpt, "--only", "ours", "nano")
        }
    for preset in BATCH:
        found[f"optimizer-{preset}"] = partial(optimizer, args, preset)
    found["generating"] = lambda: {"output": script("benchmarks/generate.py")}
    for rate in ("6e-4", "1e-3") if args.nanogpt else ():
        found[f"race-nanogpt-{rate}"] = partial(nanogpt_run, args, folder, rate)
    for name, share in {"race-ours": 1, "race-ours-half": 2, "race-ours-third": 3}.items():
        found[name] = partial(training_run, args, folder, name, lambda share=share: iterations(args) // share)
    found["race-ours-2e-3"] = partial(
        training_run, args, folder, "race-ours-2e-3", lambda: iterations(args), "--learning-rate", "2e-3"
    )
    if not (args.data_dir / "meta.json").exists() or default_iterations(args) > iterations(
        args
    ):  # else it is race-ours
        found["default-run"] = partial(training_run, args, folder, "default-run", lambda: default_iterations(args))
    return found


def choose(args: Gpu, folder: Path) -> list[str]:
    names = list(parts(args, folder))
    if unknown := set(args.part) - set(names):
        raise UserError(f"--part {' '.join(unknown)}: the parts are {' '.join(names)}")
    return [name for name in names if not args.part or name in args.part]


def progress(args: Gpu, folder: Path) -> str:
    """The parts that are done, and those that are left."""
    done = {name: (folder / f"{name}.json").exists() for name in parts(args, folder)}
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


def matrix_rate(device: str, size: int) -> float:
    """FLOP/s of a square bf16 matrix product, best of several."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return 5 * 2 * size**3 / min(seconds(lambda: [a @ a for _ in range(5)], device) for _ in range(10))


def seconds(function: Callable, device: str) -> float:
    begin = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def loss(args: Gpu, compiled: str) -> Figures:
    """The output head and its loss, in chunks of several sizes and the plain way."""
    chunks = [2**22] if args.small else [2**n for n in (25, 26, 27, 28, 29)]
    rows = 256 if args.small else 16_384
    options = ("--device", args.device, "--rows", rows, compiled, "--logits-at-once", *chunks)
    return {"output": script("benchmarks/loss.py", *options)}


def speed(args: Gpu, folder: Path, preset: str, batch_size: int) -> Figures:
    """Tokens/s and peak memory of ours, transformers and nanoGPT, one after another."""
    shape, file = with_preset(ModelConfig, preset), folder / "speed.tmp"
    cfg = with_preset(TrainConfig, preset)
    options = ("--batch-size", 1, "--rounds", 1, "--n-layer", 1) if args.small else (
        "--batch-size", batch_size, "--rounds", 20
    )  # fmt: skip
    nanogpt = ("--nanogpt", args.nanogpt) if args.nanogpt else ()
    flags = ("--device", args.device, "--preset", preset, "--tokens-per-iter", cfg.tokens_per_iter, "--out", file)
    try:
        script("benchmarks/train.py", *flags, *options, *nanogpt)
    except Failed:
        if not file.exists() or not json.loads(file.read_text()):  # else some failed, and the others have figures
            raise
    columns = ("tokens_per_second", "peak_bytes", "micro_step", "update")
    results = {name: dict(zip(columns, row, strict=True)) for name, row in json.loads(file.read_text()).items()}
    file.unlink()
    with torch.device("meta"):
        flops = GPT(dataclasses.replace(shape, n_layer=1) if args.small else shape).flops_per_token()
    run_tokens = cfg.max_iters * cfg.tokens_per_iter
    return {"results": results, "flops_per_token": flops, "batch_size": options[1], "run_tokens": run_tokens}


def optimizer(args: Gpu, preset: str) -> Figures:
    """A step of Muon and of AdamW on the preset's shape: seconds, FLOP of its matrix products, kernels launched."""
    found = {}
    for name in ("muon", "adamw"):
        found[name] = in_a_process(step_time, args.device, preset, name, args.small)
        if not args.small:
            try:
                found[name]["launches"] = in_a_process(step_launches, preset, name)
            except Failed as error:  # the profiler needs rights that not every machine gives
                print(f"{preset}, {name}: launches not counted ({first_line(error)})", flush=True)
    return found


def make_step(device: str, preset: str, name: str, small: bool) -> Callable[[], None]:
    """The step of an optimizer. Its model has random gradients."""
    cfg = dataclasses.replace(with_preset(TrainConfig, preset), optimizer=name)
    model = GPT(dataclasses.replace(cfg.model, n_layer=1) if small else cfg.model).to(device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return make_optimizer(model, cfg, torch.device(device)).step


def step_time(device: str, preset: str, name: str, small: bool) -> dict[str, float]:
    step = make_step(device, preset, name, small)
    step()
    taken = [seconds(step, device) for _ in range(3 if small else 30)]
    with FlopCounterMode(display=False) as flops:
        step()
    return {"seconds": statistics.median(taken), "flops": flops.get_total_flops()}


def step_launches(preset: str, name: str) -> int:
    step = make_step("cuda", preset, name, small=False)
    step()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if re.match("cu(da)?LaunchKernel", event.key))


# ----------------------------------------------------------------------------------------------------------------------
# Training runs, in pieces


def iterations(args: Gpu) -> int:
    """Iterations of a race: what `--tokens` allows, or fewer if the text is short."""
    if args.small:
        return 16
    return min(args.tokens // TrainConfig().tokens_per_iter, default_iterations(args))


def default_iterations(args: Gpu) -> int:
    """Iterations of the default run: the preset's 16,000, or fewer if the text is short."""
    if args.small:
        return 24
    cfg = TrainConfig()
    return min(cfg.max_iters, EPOCHS * read_meta(args.data_dir)["splits"]["train"]["tokens"] // cfg.tokens_per_iter)


def run_flags(args: Gpu, max_iters: int) -> list[str]:
    small = SMALL_RUN.split() if args.small else ["--device", "cuda"]
    return [*small, "--max-iters", str(max_iters)]


def training_run(args: Gpu, folder: Path, name: str, length: Callable[[], int], *flags: str) -> Figures:
    """A piece of a run of train.py. SIGTERM ends a piece: train.py then saves, and --auto-resume continues."""
    max_iters, out_dir = length(), folder / "runs" / name
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
    return {"curve": curve, "bits_per_byte": evaluations[-1]["bits_per_byte"]}


def nanogpt_run(args: Gpu, folder: Path, rate: str) -> Figures:
    """A piece of a run of nanoGPT's recipe, on the same number of tokens as `race-ours`."""
    name = f"race-nanogpt-{rate}"
    runs = folder / "runs"
    runs.mkdir(exist_ok=True)
    flags = run_flags(args, iterations(args))
    if not args.small:
        flags += ["--batch-size", str(BATCH["wikipedia"])]
    script(
        "benchmarks/race.py", "--data-dir", args.data_dir, "--nanogpt", args.nanogpt, f"--nanogpt-run=--learning-rate {rate}",
        f"--shape={shlex.join(flags)}", "--evaluations", EVALUATIONS, "--state", runs / f"{name}.pt",
        "--minutes", args.piece_minutes, "--out", runs / f"{name}.curve",
    )  # fmt: skip
    ((_, curve),) = json.loads((runs / f"{name}.curve").read_text()).items()
    if len(curve) < EVALUATIONS:
        return None
    bits = validation_row(curve[-1][2], read_meta(args.data_dir))["bits_per_byte"]
    return {"curve": curve, "bits_per_byte": bits}


if __name__ == "__main__":
    run(main)
