"""Before a run: does it make sense (`sanity_advice`), does it fit, and how long will it take (`preflight`, --check)?"""

import dataclasses
import functools
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import tiktoken
import torch
from torch import Tensor

from config import ModelConfig, TrainConfig
from internals.cli import with_preset
from internals.device import cuda_obstacle, device_notice, held_by_others
from internals.files import nearest_folder
from internals.machine import Machine
from internals.memory import MicroBatch, enough_memory, peak_memory
from internals.optimizer import moment_bytes
from internals.report import utilisation
from internals.run import Run, TrainState
from internals.run_folder import check_own, check_unused, check_writable
from internals.screen import about, duration, given_command, lines, plural, short_seconds, size, wrap
from internals.shards import verify
from internals.start import UserError
from internals.windows import ValidationWindows
from model import GPT

MANY_EPOCHS = 50  # from here on the advice is more text, or a shorter run
FEW_WINDOWS = 10  # of validation: with fewer, the loss says little
LONG_SECONDS = 24 * 3600  # on a CPU
UNASKED_FLOPS = 1e16  # floating-point operations, hours on a CPU: `--device auto` refuses a longer run there


class Loop(NamedTuple):
    """Functions of the loop in train.py that are timed before a run. The first argument of two is the batch size."""

    forward_backward: Callable[[int, Callable, Run, TrainState], Tensor]
    evaluate: Callable[[int, GPT, ValidationWindows, Machine], float]
    sample_text: Callable[[Run, TrainState, tiktoken.Encoding], str]


class Timing(NamedTuple):
    """Seconds."""

    iteration: float
    evaluation: float  # its arithmetic alone
    building: float = 0.0  # model and optimizer, before the first iteration
    telling: float = 0.0  # what follows an evaluation: sample text, checkpoints, curves, page
    saving: float = 0.0  # last.pt, between evaluations
    row: float = 0.0  # of metrics.jsonl, between evaluations

    def of_run(self, cfg: TrainConfig) -> float:
        """Seconds of a new run, from building the model to the last evaluation."""

        def between_evaluations(interval: int) -> int:
            """How often something with this interval is due without an evaluation. With one, `telling` includes it."""
            return cfg.max_iters // interval - cfg.max_iters // math.lcm(interval, cfg.eval_interval)

        saves, rows = between_evaluations(cfg.checkpoint_interval), between_evaluations(cfg.log_interval)
        evaluations = 1 + math.ceil(cfg.max_iters / cfg.eval_interval)
        told = evaluations * (self.evaluation + self.telling) + saves * self.saving + rows * self.row
        return self.building + cfg.max_iters * self.iteration + told


def preflight(run: Run, state: TrainState, forward: Callable, loop: Loop) -> None:
    """Verify the data, time an iteration and a piece of an evaluation, and print what the run will need.

    Writes nothing. The optimizer's moments in `state` change.

    Raises:
        UserError: a shard is not what prepare_data.py wrote, or memory or disk is too small.
    """
    cfg, machine = run.cfg, run.machine
    if machine.is_main:
        verify(cfg.data_dir)
    micro_batch = MicroBatch(run.batch_size, state.model, machine)
    timing = micro_batch.retry_smaller(measure, run, state, forward, loop)
    weights = sum(p.numel() * p.element_size() for p in state.model.parameters())
    # best.pt, last.pt, and a new last.pt beside the old one
    disk = weights + 2 * (weights + moment_bytes(state.optimizer))
    machine.print(describe(run, state, timing, micro_batch.size, disk))
    memory = peak_memory(machine)
    if memory and memory.peak > memory.total:  # a driver, or swap space, has lent the rest
        raise UserError(
            f"--batch-size {micro_batch.size}: needs {size(memory.peak)} of memory, but this machine has only "
            f"{size(memory.total)}, so the run would be very slow; take a smaller --batch-size or --block-size"
        )
    free = free_disk(run.out_dir)
    if free < disk:
        raise UserError(
            f"--out-dir {cfg.out_dir}: checkpoints need {size(disk)}, but only {size(free)} is free there; make room, or "
            "give another --out-dir"
        )
    machine.print("All of this fits.")
    try:
        refuse_long_run_on_cpu(run, state.model)
        check_writable(run.out_dir)
        check_own(run.out_dir)
        check_unused(run.out_dir)
    except UserError as error:
        machine.print(wrap(f"But {error}"))
    machine.print(f"Train: {given_command(without='--check')}")


def measure(
    batch_size: int, run: Run, state: TrainState, forward: Callable, loop: Loop, seconds: float | None = None
) -> Timing:
    """Time an iteration, and estimate an evaluation from a piece of it. The learning rate is 0, so the weights stay.

    Args:
        seconds: how long to repeat iterations; pieces of an evaluation get a third of it. A longer iteration is
            estimated from one micro-step. None: time one iteration and one piece.
    """
    cfg, windows, machine, repeat = run.cfg, run.val_windows, run.machine, seconds or 0.0
    tokens = batch_size * cfg.model.block_size * run.machine.processes  # of one micro-step
    piece = ValidationWindows(windows.stream, cfg.model.block_size, tokens)
    short = dataclasses.replace(cfg, tokens_per_iter=tokens, batch_size=batch_size)
    one_micro_step = dataclasses.replace(run, cfg=short)
    updates = []  # seconds of each; on a GPU only those of launching it

    def iterate(run: Run) -> None:
        losses = loop.forward_backward(batch_size, forward, run, state)
        state.scaler.unscale_(state.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), cfg.grad_clip or math.inf)
        if run is one_micro_step:
            losses.tolist()  # else a wait for the backward pass might count as a part of the update
        begin = time.perf_counter()
        # Not tried again with fewer sequences: the moments need the same memory, and some of them are there already
        with enough_memory("the optimizer's state does not fit into memory; take a smaller model"):
            state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()
        updates.append(time.perf_counter() - begin)
        torch.cat([losses, norm[None]]).tolist()  # waits for the device, as the loop does

    evaluate_piece = functools.partial(loop.evaluate, batch_size, state.model, piece, machine)
    for group in state.optimizer.param_groups:
        group["lr"] = 0.0
    iterate(one_micro_step)  # the first of each takes longer: kernels are loaded, buffers and moments allocated
    evaluate_piece()
    micro_steps, timed = cfg.tokens_per_iter / tokens, run
    if seconds is not None and micro_steps * mean_seconds(lambda: iterate(one_micro_step), 0.0, machine) > seconds:
        timed = one_micro_step
    updates.clear()
    iteration = mean_seconds(lambda: iterate(timed), repeat, machine)
    if timed is one_micro_step:
        iteration += (micro_steps - 1) * (iteration - sum(updates) / len(updates))
    return Timing(iteration, mean_seconds(evaluate_piece, repeat / 3, machine) * len(windows) / len(piece))


def mean_seconds(action: Callable[[], Any], seconds: float, machine: Machine) -> float:
    """The mean time of `action`, repeated for `seconds` but at least once. The slowest process counts."""
    spent, count = 0.0, 0
    while count == 0 or spent < seconds:
        begin = time.perf_counter()
        action()
        machine.confirm_memory()
        spent += machine.gather(torch.tensor([time.perf_counter() - begin])).max().item()
        count += 1
    return spent / count


def describe(run: Run, state: TrainState, timing: Timing, batch_size: int, disk: int) -> str:
    """The measurements and the run's needs, in words. `batch_size` is the one that fits, `disk` is in bytes."""
    cfg = run.cfg
    rate = cfg.tokens_per_iter / timing.iteration
    memory = peak_memory(run.machine)
    speed = (
        f"{rate:,.0f} tokens/s",
        f"{short_seconds(timing.iteration)} an iteration",
        f"{short_seconds(timing.evaluation)} an evaluation",
        utilisation(rate, state.model.flops_per_token(), run.machine),
    )
    rows = {
        "speed": ", ".join(filter(None, speed)),
        "memory": f"peak {size(memory.peak)} of {size(memory.total)}" if memory else "not measured on this device",
        "time": f"{duration(timing.of_run(cfg))} for {plural(cfg.max_iters, 'iteration')} and their evaluations; "
        "compiling, sample texts and checkpoints come on top",
        "disk": f"{size(disk)} for checkpoints, half of it only while one is written",
    }
    if batch_size < run.batch_size:
        if memory and run.machine.device.type == "cpu":  # the system keeps the highest peak of a process
            rows["memory"] += ", including the attempts that did not fit"
        rows["batch"] = f"--batch-size {run.batch_size} does not fit; training will use {batch_size}"
    return lines(rows)


def free_disk(out_dir: Path) -> int:
    """Bytes for checkpoints: the free space there, and the checkpoints of an earlier run, which this one replaces."""
    replaced = [path for path in (out_dir / "best.pt", out_dir / "last.pt") if path.exists()]
    return shutil.disk_usage(nearest_folder(out_dir)).free + sum(path.stat().st_size for path in replaced)


def refuse_long_run_on_cpu(run: Run, model: GPT | None = None) -> None:
    """Raise UserError if `--device auto` found no GPU for a run that would keep this CPU busy for long: all iterations of
    `model`, or without one the time of `--max-minutes`, which has not chosen their number yet."""
    cfg = run.cfg
    if cfg.device != "auto" or run.machine.device.type != "cpu":
        return
    rate = cpu_flops(run.machine.dtype)
    tokens = (cfg.max_iters - (run.resumed_at or 0)) * cfg.tokens_per_iter
    flops = model.flops_per_token() * tokens if model else rate * 60 * cfg.max_minutes
    if flops <= UNASKED_FLOPS:
        return
    obstacle, seconds = cuda_obstacle(), flops / rate
    raise UserError(
        f"--device auto: no GPU, and on this CPU the run would take about {about(seconds)} ({flops:.1e} floating-point "
        f"operations). {obstacle.found}; {obstacle.advice}. To train on this CPU anyway, give --device cpu"
    )


def sanity_advice(run: Run, state: TrainState) -> list[str]:
    """Settings that make no sense, and better ones: a line each. Most runs have none."""
    cfg, model, is_new = run.cfg, run.cfg.model, run.resumed_at is None
    advice = [words for words in (device_notice(cfg.device, run.machine.device), held_by_others(0.5)) if words]
    tokens = (cfg.max_iters - state.iter) * cfg.tokens_per_iter
    epoch = run.train_windows.epoch_tokens
    if tokens / epoch > MANY_EPOCHS:
        iters = state.iter + max(1, 20 * epoch // cfg.tokens_per_iter)
        shorter = "--max-epochs 20" if is_new else f"--max-iters {iters}"
        advice.append(
            f"{tokens / epoch:,.0f} epochs: after about 20 passes over the same {epoch:,} tokens the model only "
            f"memorises them; prepare more text, or give {shorter}"
            + (" and a smaller --tokens-per-iter" if iters < 100 else "")
        )
    sequences = cfg.sequences_per_process(run.machine.processes)
    if 2 * run.batch_size < (most := min(cfg.batch_size, sequences)):
        better = max(1, round(sequences / most)) * most * model.block_size * run.machine.processes
        advice.append(
            f"micro-steps have {plural(run.batch_size, 'sequence')}, because nothing larger up to {most} divides the "
            f"{sequences} of an iteration; give --tokens-per-iter {better}"
        )
    if run.machine.device.type == "cpu":
        seconds = state.model.flops_per_token() * tokens / cpu_flops(run.machine.dtype)
        if seconds > LONG_SECONDS:
            iters = state.iter + max(1, int((cfg.max_iters - state.iter) * LONG_SECONDS / 2 / seconds))
            half_a_day = "--max-minutes 720" if is_new else f"about --max-iters {iters}"
            advice.append(
                f"about {about(seconds)} on this CPU; use a GPU, --preset laptop, or {half_a_day} for half a day"
            )
    advice += evaluation_advice(run)
    usual = with_preset(ModelConfig, cfg.preset)
    wide = 4 * model.n_embd
    if is_new and not cfg.init_from and model.n_embd != usual.n_embd and model.n_inner == usual.n_inner != wide:
        advice.append(
            f"n_inner {model.n_inner:,} is {model.n_inner / model.n_embd:.2g} times n_embd {model.n_embd:,} (GPT-2 "
            f"uses 4 times); give --n-inner {wide}"
        )
    head = model.n_embd // model.n_head  # on a T4, PyTorch has no fused attention for other than multiples of 8
    if is_new and not cfg.init_from and run.machine.device.type == "cuda" and head % 8:
        wider = math.ceil(head / 8) * 8 * model.n_head
        advice.append(f"heads of {head} dimensions: a GPU is faster with a multiple of 8; give --n-embd {wider}")
    if cfg.learning_rate > 0.03:
        advice.append(
            f"--learning-rate {cfg.learning_rate:g} will most likely diverge; usual rates are between 1e-4 and 1e-2"
        )
    return advice


def evaluation_advice(run: Run) -> list[str]:
    """What makes no sense about the evaluations."""
    cfg, block_size, advice = run.cfg, run.cfg.model.block_size, []
    split_is_short = run.val_windows.available < FEW_WINDOWS  # nothing helps a resumed run then
    if len(run.val_windows) < FEW_WINDOWS and (run.resumed_at is None or not split_is_short):
        more = "prepare with a larger --val-fraction, or give a smaller --block-size"
        advice.append(
            f"{plural(len(run.val_windows), 'validation window')} of {block_size} tokens: a loss over so few windows is "
            f"unreliable; {more if split_is_short else 'give a larger --eval-tokens'}"
        )
    evaluating = run.val_windows.tokens / 3  # a forward pass is a third of an iteration's arithmetic
    if evaluating > cfg.eval_interval * cfg.tokens_per_iter:
        advice.append(
            f"evaluations take {evaluating / cfg.eval_interval / cfg.tokens_per_iter:,.1f} times as long as the training "
            "between them; give a larger --eval-interval or a smaller --eval-tokens"
        )
    return advice


def cpu_flops(dtype: torch.dtype) -> float:
    """Floating-point operations a second of training on this CPU, roughly: half of what a matrix product reaches."""
    a = torch.ones(1024, 1024, dtype=dtype)
    a @ a  # the first takes longer
    begin = time.perf_counter()
    for _ in range(3):
        a @ a
    return 0.5 * 3 * 2 * 1024**3 / (time.perf_counter() - begin)
