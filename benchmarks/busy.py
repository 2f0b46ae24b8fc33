"""Training and generating on a quiet CPU and next to a busy process, for several spin times of waiting OpenMP threads.

    python benchmarks/busy.py [--spins default 0 1000 10000] [--seconds 5] [--rounds 3]

A thread that waits for the others either spins, which is quick when they arrive soon, or sleeps. When another program
uses one of the cores, the spinning threads keep the one that they wait for from running. GOMP_SPINCOUNT is the number
of turns before a thread sleeps; `default` leaves it to the library. Commands set it in internals/start.py. All
combinations take turns; the table has medians of tokens/s.
"""

import itertools
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import common  # noqa: F401  (puts the root on the path, so it comes first)
import tyro

from internals.start import UserError, run

MODELS = ("demo", "wikipedia")
WORK = ("training", "generating")


@dataclass(frozen=True)
class Busy:
    spins: tuple[str, ...] = ("default", "0", "1000", "10000")  # values of GOMP_SPINCOUNT
    seconds: float = 5.0  # of each trial
    rounds: int = 3
    measure: tuple[str, str] | None = None  # print only the tokens/s of this process, such as: training demo


def measure(work: str, preset: str, seconds: float) -> float:
    """Tokens/s of this process."""
    import torch

    from config import ModelConfig, TrainConfig
    from generate import Sampling, generate
    from internals.cli import with_preset
    from internals.cpu_kernels import pack_weights
    from internals.device import resolve_dtype
    from internals.machine import keep_freed_memory
    from internals.optimizer import make_optimizer
    from internals.run_length import resolve_model
    from model import GPT

    torch.manual_seed(0)
    cpu = torch.device("cpu")
    shape = resolve_model(with_preset(ModelConfig, preset), epoch_tokens=10**9, epochs=1)
    model, block_size = GPT(shape), shape.block_size
    if work == "generating":
        packed = pack_weights(model.to(resolve_dtype("auto", cpu, generating=True)[0]))
        prompt = torch.zeros(8, dtype=torch.int64)

        def step() -> int:
            return sum(1 for _ in generate(packed, prompt, 20, Sampling()))
    else:
        keep_freed_memory()  # as train.py does
        dtype = resolve_dtype("auto", cpu)[0]
        optimizer = make_optimizer(model, with_preset(TrainConfig, preset), cpu, dtype)
        idx = torch.randint(model.config.vocab_size, (1024 // block_size, block_size + 1))

        def step() -> int:
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                loss = model(idx[:, :-1], idx[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return idx[:, 1:].numel()

    step()
    tokens, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        tokens += step()
    return tokens / (time.perf_counter() - begin)


def trial(work: str, preset: str, spins: str, busy: bool, seconds: float) -> float:
    """Tokens/s of a separate process, with or without a busy one beside it."""
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    if spins != "default":
        environment["GOMP_SPINCOUNT"] = spins
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        command = [sys.executable, __file__, "--measure", work, preset, "--seconds", str(seconds)]
        return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    finally:
        if neighbour:
            neighbour.kill()
            neighbour.wait()


def main() -> None:
    args = tyro.cli(Busy, description=__doc__)
    if args.measure:
        print(measure(*args.measure, args.seconds))
        return
    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds}: give at least 1")
    rates: dict[tuple, list[float]] = {}
    for _ in range(args.rounds):
        for case in itertools.product(WORK, MODELS, args.spins, (False, True)):
            rates.setdefault(case, []).append(trial(*case, args.seconds))
    print(f"{os.cpu_count()} cores, tokens/s, medians of {args.rounds} rounds of {args.seconds:g} s")
    print(f"{'':32}" + "".join(f"{spins:>12}" for spins in args.spins))
    for work, preset, busy in itertools.product(WORK, MODELS, (False, True)):
        row = [statistics.median(rates[work, preset, spins, busy]) for spins in args.spins]
        name = f"{work}, {preset}, {'busy' if busy else 'quiet'}"
        print(f"{name:32}" + "".join(f"{rate:12,.1f}" for rate in row))


if __name__ == "__main__":
    run(main)
