"""All figures that need a GPU, in one command of about 25 minutes:

    python benchmarks/gpu.py --source DIR --nanogpt DIR

1. The card's matrix rate.
2. The loss, plain and in chunks.
3. Speed and memory against transformers and nanoGPT, for the default and the 150-million shape, with MFU against the
   measured matrix rate, and the time of the whole default run on this card.
4. A race: nanoGPT's GPT-2 recipe on `--tokens` tokens, and our defaults on as many, half as many and a third.

Each part prints its figures when it ends. If a part fails, the others still run. `--small` runs every part on a CPU in
minutes.
"""

import dataclasses
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from common import REPO

from config import ModelConfig, TrainConfig
from internals.cli import with_preset
from model import GPT

TOKENS_PER_ITER = 65_536


@dataclass(frozen=True)
class Gpu:
    source: str  # what prepare_data.py --source takes: a folder of Wikipedia's parquet files
    nanogpt: str  # folder of a checkout of nanoGPT
    tokens: int = 150_000_000  # in the race
    out: str = "gpu"  # folder for data and figures
    small: bool = False  # tiny, on the CPU, to see that every part runs


def run(*args: object) -> bool:
    """Run a script of this repository and show its output. True if it succeeded."""
    command = [str(a) for a in args]
    print("\n$ python", *command, flush=True)
    begin = time.perf_counter()
    status = subprocess.run([sys.executable, *command], cwd=REPO).returncode
    print(f"({time.perf_counter() - begin:.0f} s, exit status {status})", flush=True)
    return status == 0


def matrix_rate(device: str, size: int) -> float:
    """FLOP/s of a square bf16 matrix product, best of several."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    rates = []
    for _ in range(10):
        begin = time.perf_counter()
        for _ in range(5):
            a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        rates.append(5 * 2 * size**3 / (time.perf_counter() - begin))
    return max(rates)


def speed(args: Gpu, out: Path, preset: str, batch_size: int, tokens_per_iter: int, rate: float) -> None:
    """Part 3 for one shape."""
    device = ("--device", "cpu", "--n-layer", 1) if args.small else ("--device", "cuda")
    file = out / f"speed-{preset}.json"
    if not run(
        "benchmarks/train.py", "--nanogpt", args.nanogpt, "--preset", preset, "--batch-size", batch_size,
        "--tokens-per-iter", tokens_per_iter, "--rounds", 2 if args.small else 20, *device, "--out", file,
    ):  # fmt: skip
        return
    ours = next(iter(json.loads(file.read_text()).values()))[0]  # tokens/s
    with torch.device("meta"):
        shape = with_preset(ModelConfig, preset)
        gpt = GPT(dataclasses.replace(shape, n_layer=1) if args.small else shape)
    print(f"{preset}: MFU {ours * gpt.flops_per_token() / rate:.1%} of the measured matrix rate")
    minutes = with_preset(TrainConfig, preset).max_iters * tokens_per_iter / ours / 60
    print(f"{preset}: the preset's whole run would take {minutes:,.0f} minutes on this card, evaluation excluded")
    print(
        f"On another card, roughly: {minutes * rate / 1e12:,.0f} minutes over its bf16 matrix rate in TFLOP/s "
        f"(this one's is {rate / 1e12:.1f})"
    )


def main() -> None:
    args = tyro.cli(Gpu, description=__doc__)
    out = Path(args.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    device = "cpu" if args.small else "cuda"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    rate = matrix_rate(device, 512 if args.small else 8192)
    print(f"{name}, torch {torch.__version__}: {rate / 1e12:.1f} TFLOP/s in bf16 matrix products")

    data_dir = out / "data"
    limit = ("--max-tokens", 300_000) if args.small else ()
    if not run("prepare_data.py", "--source", args.source, "--tokenizer", "gpt2", "--data-dir", data_dir, *limit):
        sys.exit("without data there is no race")

    rows = 256 if args.small else 16_384
    chunks = [2**22] if args.small else [2**n for n in (25, 26, 27, 28, 29)]
    for compiled in ("--no-compile", "--compile"):
        run("benchmarks/loss.py", "--device", device, "--rows", rows, compiled, "--logits-at-once", *chunks)

    speed(args, out, "wikipedia", 2 if args.small else 64, TOKENS_PER_ITER, rate)
    speed(args, out, "wikipedia-150m", 1 if args.small else 8, 4 * TOKENS_PER_ITER, rate)

    iterations = 4 if args.small else args.tokens // TOKENS_PER_ITER
    shape = "--eval-tokens 204800"
    if args.small:
        shape = (
            "--device cpu --n-layer 1 --n-head 2 --n-embd 32 --n-inner 64 --batch-size 4 --tokens-per-iter 1024 "
            "--eval-tokens 2048"
        )
    warmup = iterations // 10
    lengths = [f"--max-iters {iterations // n} --warmup-iters {min(warmup, 256)}" for n in (1, 2, 3)]
    run(
        "benchmarks/race.py", "--data-dir", data_dir, "--nanogpt", args.nanogpt, "--nanogpt-learning-rates", 6e-4, 1e-3,
        f"--shape={shape} {lengths[0]}", *(f"--run={length}" for length in lengths),
        "--evaluations", 4, "--out", out / "race.json",
    )  # fmt: skip


if __name__ == "__main__":
    main()
