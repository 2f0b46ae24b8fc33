"""Training speed: tokens per second and peak memory of this project and its peers, taking turns on one machine.

    python benchmarks/train.py --nanogpt DIR                     the default shape, 16 sequences of 256 tokens
    python benchmarks/train.py --device cuda --batch-size 64     on a GPU: everyone bf16 and compiled
    python benchmarks/train.py --device cuda --batch-size 64 --kernels    and what the GPU does in an iteration

Peers are transformers' GPT-2 and, if `--nanogpt` names a checkout, nanoGPT. Each competitor runs in its own process, so
that its peak memory is its own. In every round it makes a micro-step (forward and backward on the same random tokens)
and a step of its optimizer with clipping. The output is the medians over the rounds, and the tokens per second of an
iteration of `--tokens-per-iter` tokens: several micro-steps and one optimizer step.

On a CPU, whose speed varies with what else it does, the competitors take turns in every round, and the time of an
iteration is calculated from that of a micro-step and a step. On a GPU they run one after another, so that its memory
need not hold them all, and a round has a whole iteration as well, without waits inside. So its time includes adding up
the gradients of the micro-steps, and the starting of kernels while others run.
"""

import dataclasses
import functools
import math
import multiprocessing
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple

import common  # puts the root on the path, so it comes first
import torch
import tyro

import model
import train
from config import PRESETS, ModelConfig, TrainConfig
from internals.cli import with_preset
from internals.device import resolve_device
from internals.files import write_json
from internals.machine import Machine
from internals.memory import is_out_of_memory, peak_memory
from internals.run_length import resolve_model
from internals.start import UserError, first_line, run


@dataclass(frozen=True)
class Comparison:
    nanogpt: str | None = None  # folder of a checkout of nanoGPT; None: leave it out
    device: str = "cpu"  # cpu or cuda
    batch_size: int = 16  # sequences in a micro-step
    tokens_per_iter: int = 65_536  # tokens per step of the optimizer
    rounds: int = 5  # steps of each competitor, after one to warm up
    preset: Literal[tuple(PRESETS)] = "wikipedia"  # its shape is used
    n_layer: int | None = None  # number of layers, if not the preset's
    vocab_size: int = ModelConfig.vocab_size  # tokens of the vocabulary
    out: str | None = None  # file for the figures, as JSON
    only: tuple[str, ...] = ()  # competitors whose names begin with these; empty: all
    reverse: bool = False  # on a GPU: the competitors in reverse order
    kernels: bool = False  # on a GPU: also the longest kernels of an iteration by PyTorch's profiler


# ----------------------------------------------------------------------------------------------------------------------
# Competitors: each returns two functions, a micro-step on (B, T) inputs and targets, and the optimizer's step


def ours(args: Comparison, shape: ModelConfig, dtype: str, compiled: bool) -> tuple[Callable, Callable]:
    """train.py's parts: its model, loss, optimizer, precision."""
    cfg = TrainConfig(
        model=shape, device=args.device, dtype=dtype, compile="on" if compiled else "off",
        batch_size=args.batch_size, tokens_per_iter=args.batch_size * shape.block_size,
    )  # fmt: skip
    machine = train.make_machine(cfg)
    gpt = model.GPT(shape).to(machine.device)
    optimizer = train.make_optimizer(gpt, cfg, machine.device, machine.dtype)
    forward = common.training_model(gpt, cfg, machine)

    def micro_step(inputs: torch.Tensor, targets: torch.Tensor) -> None:
        with machine.autocast():
            loss = forward(inputs, targets)
        loss.backward()

    return micro_step, lambda: update(gpt, optimizer)


def update(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def peer(args: Comparison, module: torch.nn.Module, loss_of: Callable, optimizer: Any, bf16: bool, compiled: bool):
    forward = torch.compile(module) if compiled else module

    def micro_step(inputs: torch.Tensor, targets: torch.Tensor) -> None:
        with torch.autocast(args.device, dtype=torch.bfloat16, enabled=bf16):
            loss = loss_of(forward, inputs, targets)
        loss.backward()

    return micro_step, lambda: update(module, optimizer)


def transformers_gpt2(args: Comparison, shape: ModelConfig, compiled: bool) -> tuple[Callable, Callable]:
    """transformers' GPT-2, bf16 autocast, fused AdamW. It shifts the labels itself, so they are the inputs."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_float32_matmul_precision("high")
    module = GPT2LMHeadModel(
        GPT2Config(
            n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd, n_inner=shape.n_inner,
            n_positions=shape.block_size, vocab_size=shape.vocab_size,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        )
    ).to(args.device)  # fmt: skip
    adamw = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    return peer(args, module, lambda f, inputs, _: f(inputs, labels=inputs).loss, adamw, True, compiled)


def nanogpt(args: Comparison, shape: ModelConfig, bf16: bool, compiled: bool) -> tuple[Callable, Callable]:
    """nanoGPT's model with its own optimizer. On a CPU, its train.py runs it in float32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    module = common.nanogpt_model(args.nanogpt, shape).to(args.device)
    optimizer = module.configure_optimizers(0.1, 6e-4, (0.9, 0.95), args.device)
    return peer(args, module, lambda f, inputs, targets: f(inputs, targets)[1], optimizer, bf16, compiled)


def competitors(args: Comparison) -> dict[str, tuple[Callable, dict[str, Any]]]:
    """Name -> the function that builds it, and its arguments."""
    if args.device == "cuda":  # here everyone compiles, and bf16 is the default
        everyone = {
            "ours": (ours, {"dtype": "bfloat16", "compiled": True}),
            "ours, eager": (ours, {"dtype": "bfloat16", "compiled": False}),
            "transformers GPT-2": (transformers_gpt2, {"compiled": True}),
            "nanoGPT": (nanogpt, {"bf16": True, "compiled": True}),
        }
    else:
        everyone = {
            "ours bf16": (ours, {"dtype": "bfloat16", "compiled": False}),
            "ours bf16 compiled": (ours, {"dtype": "bfloat16", "compiled": True}),
            "transformers GPT-2 bf16": (transformers_gpt2, {"compiled": False}),
            "nanoGPT fp32 (as it runs)": (nanogpt, {"bf16": False, "compiled": False}),
            "nanoGPT bf16": (nanogpt, {"bf16": True, "compiled": False}),
        }
    return {
        name: how
        for name, how in everyone.items()
        if (args.nanogpt or how[0] is not nanogpt) and (not args.only or name.startswith(args.only))
    }


# ----------------------------------------------------------------------------------------------------------------------
# The comparison


class Turn(NamedTuple):
    """Seconds."""

    micro_step: float
    update: float
    iteration: float


class Result(NamedTuple):
    """Medians of a competitor's turns."""

    tokens_per_second: float
    peak_bytes: float  # NaN: the system does not tell
    micro_step: float  # seconds
    update: float  # seconds


class OutOfMemory(Exception):
    """A competitor does not fit on the card."""


def compete(connection: Connection, name: str, args: Comparison, shape: ModelConfig) -> None:
    """The process of one competitor. It sends a `Turn` for every message, and its peak memory after None. It ends with
    an `OutOfMemory` if that happens."""
    try:
        take_turns(connection, name, args, shape)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        connection.send(OutOfMemory(first_line(error)))


def take_turns(connection: Connection, name: str, args: Comparison, shape: ModelConfig) -> None:
    make, arguments = competitors(args)[name]
    torch.manual_seed(0)
    micro_step, optimize = make(args, shape, **arguments)
    tokens = torch.randint(shape.vocab_size, (args.batch_size, shape.block_size + 1)).to(args.device)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]  # ours is compiled for this layout
    if make is not ours:  # the others read contiguous batches
        inputs, targets = inputs.contiguous(), targets.contiguous()
    micro_steps = args.tokens_per_iter / (args.batch_size * shape.block_size)

    def iteration() -> None:
        for _ in range(int(micro_steps)):
            micro_step(inputs, targets)
        optimize()

    seconds = functools.partial(common.seconds, device=args.device)
    while connection.recv():
        micro, update = seconds(lambda: micro_step(inputs, targets)), seconds(optimize)
        whole = seconds(iteration) if args.device == "cuda" else micro_steps * micro + update
        connection.send(Turn(micro, update, whole))
    if args.kernels:
        print(f"\n{name}: {describe_kernels(iteration)}", flush=True)
    memory = peak_memory(Machine(resolve_device(args.device), torch.float32, "", 0, 1))
    connection.send(memory.peak if memory else math.nan)


def describe_kernels(iteration: Callable) -> str:
    """The time of an iteration on a GPU without waits, the time in which the GPU works, and its longest kernels."""
    iteration()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(20):
        iteration()
    torch.cuda.synchronize()
    wall = (time.perf_counter() - begin) / 20
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        iteration()
        torch.cuda.synchronize()
    taken, counts = Counter(), Counter()
    for event in profile.events():
        # An optimizer's own range spans its kernels, and the gaps between them
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith("Optimizer."):
            taken[event.name] += event.device_time_total  # microseconds
            counts[event.name] += 1
    head = f"{1e3 * wall:.1f} ms an iteration; the GPU works for {taken.total() / 1e3:.1f} ms in {counts.total():,} kernels"
    rows = [f"{time / 1e3:9.2f} ms {counts[kernel]:6}  {kernel[:100]}" for kernel, time in taken.most_common(25)]
    return "\n".join([head, *rows])


class Competitor:
    """The other end of such a process, which has had one turn to allocate its buffers and to compile."""

    def __init__(self, name: str, args: Comparison, shape: ModelConfig):
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=compete, args=(theirs, name, args, shape), daemon=True)
        self.process.start()
        theirs.close()
        self.turn()

    def turn(self) -> Turn:
        return self.ask(True)

    def end(self) -> int:
        """End the process. Returns its peak memory in bytes."""
        peak = self.ask(None)
        self.process.join()
        return peak

    def ask(self, message: bool | None) -> Any:
        self.connection.send(message)
        answer = self.connection.recv()
        if isinstance(answer, OutOfMemory):
            self.process.join()  # the next one gets its memory
            raise answer
        return answer


def compare(args: Comparison) -> dict[str, Result | None]:
    """Name -> figures. On a GPU, None for a competitor that runs out of memory; one that fails is missing."""
    shape = resolve_model(with_preset(ModelConfig, args.preset), epoch_tokens=10**9, epochs=1)
    shape = dataclasses.replace(shape, n_layer=args.n_layer or shape.n_layer, vocab_size=args.vocab_size, dropout=0.0)
    names = list(competitors(args))
    if args.device == "cpu":
        try:
            return measure(names, args, shape)
        except (EOFError, ConnectionError) as error:
            raise UserError("a competitor failed, see above") from error
    if args.tokens_per_iter % (args.batch_size * shape.block_size):
        raise UserError(f"--tokens-per-iter: must be a multiple of {args.batch_size} x {shape.block_size}")
    results: dict[str, Result | None] = {}
    for name in reversed(names) if args.reverse else names:
        try:
            results |= measure([name], args, shape)
        except OutOfMemory as error:
            print(f"{name}: {error}", file=sys.stderr)
            results[name] = None
        except (EOFError, ConnectionError):  # its process has ended and has said why
            pass
    return {name: results[name] for name in names if name in results}


def measure(names: list[str], args: Comparison, shape: ModelConfig) -> dict[str, Result]:
    """The results of competitors that run at the same time and take turns."""
    running = [Competitor(name, args, shape) for name in names]
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for one in running:
            turns[one.name].append(one.turn())
            print(f"{one.name:28}" + "".join(f"{seconds:8.3f} s" for seconds in turns[one.name][-1]), file=sys.stderr)
    results = {}
    for one in running:
        micro, update, whole = (statistics.median(values) for values in zip(*turns[one.name], strict=True))
        results[one.name] = Result(args.tokens_per_iter / whole, one.end(), micro, update)
    return results


def table(results: dict[str, Result]) -> str:
    """The figures, and the ratio of the first row to each row."""
    first = next(iter(results.values()))
    rows = [
        f"{'':28}{'tokens/s':>10}{'first is':>10}{'peak MiB':>10}{'first has':>10}{'micro-step s':>14}{'update s':>10}"
    ]
    for name, (speed, memory, micro, update) in results.items():
        ratios = f"{first.tokens_per_second / speed:9.2f}x", f"{first.peak_bytes / memory:9.2f}x"
        rows.append(f"{name:28}{speed:10,.0f}{ratios[0]}{memory / 2**20:10,.0f}{ratios[1]}{micro:14.3f}{update:10.3f}")
    return "\n".join(rows)


def main() -> None:
    args = tyro.cli(Comparison, description=__doc__)
    if args.kernels and args.device != "cuda":
        raise UserError("--kernels: needs --device cuda")
    results = compare(args)
    fitting = {name: result for name, result in results.items() if result}
    print(table(fitting) if fitting else "")
    if too_large := [name for name in results if name not in fitting]:
        print(f"Out of memory: {', '.join(too_large)}")
    missing = [name for name in competitors(args) if name not in results]
    if args.out:
        figures = {name: result and result._asdict() for name, result in results.items()}
        write_json(args.out, {"results": figures, "missing": missing})
    if missing:
        raise UserError(f"{', '.join(missing)}: failed, see above")


if __name__ == "__main__":
    run(main)
