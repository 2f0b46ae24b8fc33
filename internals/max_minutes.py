"""`--max-minutes`: measure a new run's speed before it begins, and choose how many iterations fit in the time."""

import bisect
import contextlib
import dataclasses
import gc
import io
import math
import time
from typing import NamedTuple

import torch

from config import TrainConfig
from internals import start
from internals.compilation import training_model
from internals.files import nearest_folder, temporary_folder, writing
from internals.memory import MicroBatch
from internals.optimizer import make_optimizer
from internals.preflight import Loop, Timing, mean_seconds, measure, refuse_long_run_on_cpu
from internals.report import RunLog
from internals.run import Run, TrainState, initial_model, save
from internals.run_length import most_iterations, resolve_auto, tenth
from internals.samples import load_sample_tokenizer
from internals.screen import short_seconds, wrap
from internals.start import UserError
from internals.stopping import end_like_ctrl_c

MARGIN = 0.05  # share of the time kept for the end of the process and for a machine that slows down
MEASURING = 0.03  # share of the time spent measuring iterations; evaluations get a third of that
MOST_MEASURING = 120.0  # seconds
FEWEST = 10  # iterations; a shorter run is not worth starting


class Measured(NamedTuple):
    timing: Timing
    passed: float  # seconds since the command began
    iterations: int  # that fit into the time that is left


@end_like_ctrl_c()
def fit_minutes(cfg: TrainConfig, run: Run, loop: Loop) -> TrainConfig:
    """`cfg` without `max_minutes`, but with the `max_iters` that makes the whole command end in that time.

    Measures with its own model and optimizer, so the run that follows equals one that was given this `max_iters`.

    Args:
        cfg: the command's settings, which may include `auto`.
        run: the run, with a number for each `auto`.

    Raises:
        UserError: the time is too short, or so long that a CPU needs `--device cpu`.
    """
    if not cfg.check:
        refuse_long_run_on_cpu(run)  # before two minutes of measuring
    machine, epoch_tokens = run.machine, run.train_windows.epoch_tokens
    command, cfg = cfg, dataclasses.replace(cfg, tokens_per_iter=run.cfg.tokens_per_iter)  # the same at any length

    def dropout(iterations: int) -> float:
        return of_length(cfg, iterations, epoch_tokens).model.dropout

    def time_run(run: Run) -> Measured:
        timing = try_out(run, measuring_seconds(cfg.max_minutes), loop)
        passed = start.seconds_passed()
        seconds = (1 - MARGIN) * 60 * cfg.max_minutes - passed
        iterations = int(machine.gather(torch.tensor([iterations_within(seconds, cfg, epoch_tokens, timing)])).min())
        refuse_too_few(iterations, cfg, epoch_tokens, timing, passed)
        return Measured(timing, passed, iterations)

    timing, passed, iterations = time_run(run)
    needed = dropout(iterations)
    if needed != run.cfg.model.dropout:  # the length decides `--dropout auto`, and dropout an iteration's time: again
        model = dataclasses.replace(run.cfg.model, dropout=needed)
        timing, passed, iterations = time_run(dataclasses.replace(run, cfg=dataclasses.replace(run.cfg, model=model)))
        if dropout(iterations) != needed:  # fewer fit with it, and need another: take the most that need no more
            iterations = bisect.bisect_right(range(1, iterations + 1), needed, key=dropout)
    words = (
        f"--max-minutes {cfg.max_minutes:g}: an iteration takes {short_seconds(timing.iteration)}, an evaluation with its text, "
        f"page and checkpoints {short_seconds(timing.evaluation + timing.telling)}, and {passed:.0f} s have passed; "
    )
    if iterations == most_iterations(dataclasses.replace(cfg, max_iters=iterations + 1), epoch_tokens):
        words += f"--max-epochs {cfg.max_epochs:g} allows {iterations:,} iterations, which take less than the time left"
    else:
        words += f"this leaves time for {iterations:,} iterations"
    machine.print(wrap(words))
    return dataclasses.replace(command, max_iters=iterations, max_minutes=None, batch_size=run.cfg.batch_size)


def measuring_seconds(minutes: float) -> float:
    """Seconds to spend measuring, in a command of this many minutes."""
    return min(MEASURING * 60 * minutes, MOST_MEASURING)


def of_length(cfg: TrainConfig, iterations: int, epoch_tokens: int) -> TrainConfig:
    """`cfg` for a run of this length, with a number for each `auto`."""
    return resolve_auto(dataclasses.replace(cfg, max_iters=iterations), epoch_tokens).cfg


def iterations_within(seconds: float, cfg: TrainConfig, epoch_tokens: int, timing: Timing) -> int:
    """The most iterations that a run can do in this time; 0 if not even one fits."""

    def needed(iterations: int) -> float:
        return timing.of_run(of_length(cfg, iterations, epoch_tokens))

    # One iteration more takes longer, except where the evaluation interval follows the length and jumps: then there are
    # fewer evaluations. So each stretch of lengths with the same interval is searched by itself, the longest first.
    longest = max(0, int(min(seconds / timing.iteration, 2**62)))  # bisect takes no longer range
    allowed = most_iterations(dataclasses.replace(cfg, max_iters=max(1, longest)), epoch_tokens)
    lengths = range(1, 1 + min(longest, allowed))
    while lengths:
        begin = bisect.bisect_left(lengths, tenth(lengths[-1]), key=tenth)
        if needed(lengths[begin]) <= seconds:
            return lengths[begin:][bisect.bisect_right(lengths[begin:], seconds, key=needed) - 1]
        lengths = lengths[:begin]
    return 0


def refuse_too_few(iterations: int, cfg: TrainConfig, epoch_tokens: int, timing: Timing, passed: float) -> None:
    """Raise UserError if the time is too short for a run. `passed`: seconds since the command began."""
    fewest = most_iterations(dataclasses.replace(cfg, max_iters=FEWEST), epoch_tokens)
    if iterations >= fewest:
        return
    seconds = (passed + timing.of_run(of_length(cfg, fewest, epoch_tokens))) / (1 - MARGIN)
    # With more time, measuring takes longer: a third more for the evaluations, and the last iteration may begin late
    longer = measuring_seconds(seconds / 60) - measuring_seconds(cfg.max_minutes)
    seconds += (4 / 3 * longer + timing.iteration) / (1 - MARGIN)
    minutes = math.ceil(10 * seconds / 60) / 10
    raise UserError(
        f"--max-minutes {cfg.max_minutes:g}: too short. An iteration takes {short_seconds(timing.iteration)} here, an "
        f"evaluation with its text, page and checkpoints {short_seconds(timing.evaluation + timing.telling)}, and "
        f"{passed:.0f} s have passed; give "
        f"at least --max-minutes {minutes:g}, or a smaller model"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def try_out(run: Run, seconds: float, loop: Loop) -> Timing:
    """Build the model, and time everything that a run does with it. Iterations are repeated for `seconds`."""
    machine, begin = run.machine, time.perf_counter()
    model = initial_model(run).to(machine.device)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    state = TrainState(model, make_optimizer(model, run.cfg, machine.device, machine.dtype), scaler, val_loss=0.0)
    building = time.perf_counter() - begin
    forward, _ = training_model(model, run.cfg, machine)  # the run need not compile this again
    timing = MicroBatch(run.batch_size, model, machine).retry_smaller(measure, run, state, forward, loop, seconds)
    timing = time_records(run, state, timing, loop)
    del model, state, forward
    gc.collect()
    if machine.device.type == "cuda":
        torch.cuda.empty_cache()
    return timing._replace(building=building)


def time_records(run: Run, state: TrainState, timing: Timing, loop: Loop) -> Timing:
    """`timing` with the seconds of a run's writes, tried in a temporary folder on the disk of `out_dir`."""
    machine = run.machine
    parent = nearest_folder(run.out_dir)
    with (
        writing(parent),
        temporary_folder(parent, prefix=".max-minutes-") as folder,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        run = dataclasses.replace(run, cfg=dataclasses.replace(run.cfg, out_dir=str(folder), tracker="none"))
        tokenizer = load_sample_tokenizer(run)
        with contextlib.closing(RunLog(run, state)) as log:
            log.begin()

            def tell() -> None:
                log.write_row(True)
                if tokenizer:
                    log.write_sample(tokenizer, loop.sample_text(run, state, tokenizer))
                log.flush()
                save(run, state, True)
                log.tell_evaluation(True)

            tell()  # the first takes longer: matplotlib is imported
            return timing._replace(
                telling=mean_seconds(tell, 0.0, machine),
                saving=mean_seconds(lambda: save(run, state, False), 0.0, machine),
                row=mean_seconds(lambda: log.write_row(False), 0.0, machine),
            )
