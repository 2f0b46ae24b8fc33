"""Train a GPT-2 on a folder of token shards.

    python train.py                               the default model on data/wikipedia
    python train.py --resume                      continue a stopped run
    python train.py --check                       will it fit, how long will it take? (writes nothing)
    torchrun --standalone --nproc-per-node 8 train.py    the same run on eight GPUs, faster

`train` is the whole run, from top to bottom. The functions that it calls follow: one iteration, evaluation and sample
text, and the command. Folders, checkpoints, devices and reports are in internals/.
"""

from internals import start

if __name__ == "__main__":
    start.begin()  # mistakes and --help are answered at once: PyTorch takes seconds to import

    from config import TrainConfig
    from internals.cli import parse

    CFG = parse(TrainConfig, "Train a GPT-2 on a folder of token shards.")

import contextlib
import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable

import tiktoken
import torch
from torch import Tensor

from config import TrainConfig
from generate import generate_text
from internals import checkpoint, pretrained
from internals.batch_size import resolve_batch_size
from internals.compilation import training_model
from internals.device import device_notice, held_by_others
from internals.machine import Machine, Outcome, make_machine
from internals.max_minutes import fit_minutes
from internals.memory import MicroBatch, is_out_of_memory
from internals.optimizer import get_lr, make_optimizer
from internals.preflight import Loop, preflight, refuse_long_run_on_cpu, sanity_advice
from internals.processes import is_failed_exchange, leave_processes, why_exchange_failed
from internals.report import RunLog, already_finished, ending, startup, validation_row, window_text
from internals.resume import resume_settings
from internals.run import (
    Run,
    TrainState,
    check_same_everywhere,
    check_tokenizer,
    complete_config,
    initial_model,
    load_resumable,
    lock_run_folder,
    open_run,
    restore,
    save,
)
from internals.run_length import iteration_tokens
from internals.samples import SAMPLE, load_sample_tokenizer
from internals.screen import lines, printable
from internals.shards import read_meta, read_tokenizer
from internals.shell import shell_join
from internals.start import UserError, first_line
from internals.stopping import catch_signals, keep_earlier_run
from internals.windows import TokenStream, ValidationWindows
from model import GPT

SAMPLE_TOKENS = 64  # tokens of sample text per evaluation


def train(cfg: TrainConfig) -> None:
    """Train as `cfg` says, from the start or from last.pt."""
    # 1. Machine, data and folder
    machine = make_machine(cfg)
    if cfg.eval_only:
        return eval_only(cfg, machine)
    saved = load_resumable(cfg, machine)  # None: a new run
    run = open_run(cfg, machine, saved)
    loop = Loop(forward_backward, evaluate, sample_text)  # timed by --max-minutes and --check
    if cfg.max_minutes and not saved:
        cfg = fit_minutes(cfg, run, loop)
        run = open_run(cfg, machine, saved)
    cfg, machine = run.cfg, run.machine
    if saved and run.resumed_at >= cfg.max_iters:
        return machine.print(already_finished(run))

    # 2. Model and optimizer
    torch.manual_seed(cfg.seed)  # the same weights in every process
    model = initial_model(run).to(machine.device)
    if not cfg.check:
        refuse_long_run_on_cpu(run, model)
    optimizer = make_optimizer(model, cfg, machine.device, machine.dtype)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    state = TrainState(model, optimizer, scaler)
    forward, compiling = training_model(model, cfg, machine)
    torch.manual_seed(cfg.seed + machine.rank)  # different dropout in every process
    if saved:
        restore(state, saved, machine)
        saved = None  # frees its memory
    machine.share_weights(model)
    machine.print(startup(run, state, compiling))
    for advice in sanity_advice(run, state):
        machine.print(lines({"advice": advice}))
    if cfg.check:
        return preflight(run, state, forward, loop)

    # 3. The loop
    tokenizer = load_sample_tokenizer(run)
    micro_batch = MicroBatch(run.batch_size, model, machine)  # retry_smaller(f, ...) calls f(batch size, ...)
    reevaluate_best(run, state, micro_batch)
    with catch_signals(machine) as stop, lock_run_folder(run), contextlib.closing(RunLog(run, state)) as log:
        stopping = False
        while True:
            # Evaluate, log, save, print
            finished = state.iter == cfg.max_iters
            if state.iter != run.resumed_at:  # a resumed run did all of this before it stopped
                evaluating = finished or state.iter % cfg.eval_interval == 0
                best = False
                if evaluating:
                    val_loss = micro_batch.retry_smaller(evaluate, model, run.val_windows, machine)
                    best = record_validation(val_loss, run, state)
                if state.iter == 0:
                    keep_earlier_run(run, stop)
                    log.begin()  # deletes an earlier run's files, now that this one has passed an evaluation
                if evaluating or state.iter % cfg.log_interval == 0 or state.iter == 1:
                    log.write_row(evaluating)
                if evaluating and tokenizer:
                    log.write_sample(tokenizer, sample_text(run, state, tokenizer))
                if evaluating or state.iter % cfg.checkpoint_interval == 0 or stopping:
                    log.flush()
                    save(run, state, best)
                if evaluating:
                    log.tell_evaluation(best)
            if finished or stopping:
                break

            # The learning rate
            begin = time.perf_counter()
            learning_rate = get_lr(state.iter, cfg)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group["lr_scale"]

            # Gradients over micro-steps, clipped to a norm of at most grad_clip
            losses = micro_batch.retry_smaller(forward_backward, forward, run, state)
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)

            # The step
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

            # The only wait for the device (in float16, scaler.step waits too). It comes after the step, so that the GPU
            # gets the whole iteration without a pause
            outcome = machine.wait(losses, norm, stop.is_set())
            stop_if_not_finite(outcome, run, state, micro_batch.size)
            stopping = outcome.stop
            seconds = time.perf_counter() - begin
            state.iter, state.tokens = state.iter + 1, state.tokens + cfg.tokens_per_iter
            state.seconds += seconds
            train_loss = sum(outcome.losses) / len(outcome.losses)
            log.iteration(train_loss, learning_rate, outcome.grad_norm, seconds)

    machine.print(ending(run, state))


# ----------------------------------------------------------------------------------------------------------------------
# One iteration


def forward_backward(
    batch_size: int, forward: Callable[[Tensor, Tensor], Tensor], run: Run, state: TrainState
) -> Tensor:
    """Compute the gradient of the mean loss over all micro-steps and processes, in `.grad`.

    Args:
        batch_size: sequences in a micro-step.
        forward: the model, compiled or not: inputs and targets (B, T) to the loss.

    Returns:
        (micro-steps,) the losses of this process, on the device. Nothing here waits for them.
    """
    machine, losses = run.machine, []
    micro_steps = run.window_ids(state.tokens, batch_size)
    for window_ids in micro_steps:
        inputs, targets = machine.to_device(run.train_windows.batch(window_ids))
        with machine.autocast():
            loss = forward(inputs, targets)
        state.scaler.scale(loss / (len(micro_steps) * machine.processes)).backward()
        losses.append(loss.detach())
    losses = torch.stack(losses)  # here, since after the exchange nothing may run out of memory
    machine.sum_gradients(state.model)
    return losses


def stop_if_not_finite(outcome: Outcome, run: Run, state: TrainState, batch_size: int) -> None:
    """Raise UserError if a loss or the gradient is infinite or NaN. The message names the iteration and the text."""
    bad = [n for n, loss in enumerate(outcome.losses) if not math.isfinite(loss)]
    # In float16 the scaler handled an overflow: it skipped the step and halved the scale, which must not fall below 1
    rescued = state.scaler.is_enabled() and state.scaler.get_scale() >= 1
    if not bad and (math.isfinite(outcome.grad_norm) or rescued):
        return
    block_size, first = run.cfg.model.block_size, state.tokens // run.cfg.model.block_size
    micro_steps = bad or range(len(outcome.losses))  # of all processes, in the order of their windows
    window_ids = [first + step * batch_size + n for step in micro_steps for n in range(batch_size)]
    starts = [str(run.train_windows.start(number)) for number in window_ids]
    shown = ", ".join(starts[:8]) + (f" and {len(starts) - 8} more" if len(starts) > 8 else "")
    what = f"the loss of micro-step {bad[0] + 1} of {len(outcome.losses)}" if bad else "the gradient"
    advice = f"Continue from {run.out_dir}/last.pt with --resume and a lower --learning-rate"
    if run.resumed_at and state.iter == run.resumed_at:  # resuming would fail again
        best = shell_join([f"{run.out_dir}/best.pt"])
        advice = f"Start a new run with --init-from {best}, another --out-dir and a lower --learning-rate"
    raise UserError(
        f"{what} is not finite in iteration {state.iter + 1} (learning rate {get_lr(state.iter, run.cfg):.3g}, gradient "
        f"norm {outcome.grad_norm:.3g}). last.pt is from before that. The batch: windows of {block_size} tokens of the "
        f"training split that begin at token {shown}. {window_text(run, window_ids[0])}{advice}{run.machine.or_float32}"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation, and sample text


@torch.no_grad()
def evaluate(batch_size: int, model: GPT, windows: ValidationWindows, machine: Machine) -> float:
    """The mean loss over all validation windows, in nats per token. Each process evaluates its share of them."""
    model.eval()
    total = torch.zeros(1, device=machine.device)
    begin = len(windows) * machine.rank // machine.processes
    end = len(windows) * (machine.rank + 1) // machine.processes
    for first in range(begin, end, batch_size):
        last = min(first + batch_size, end)
        inputs, targets = machine.to_device(windows.batch(first, last))
        with machine.autocast():
            total += model(inputs, targets) * (last - first)
    model.train()
    machine.confirm_memory()  # before the exchange: another process may have run out of memory
    return machine.gather(total).sum().item() / len(windows)


def record_validation(val_loss: float, run: Run, state: TrainState) -> bool:
    """Store a validation loss in `state`. Returns whether it is the best so far. Raises UserError if not finite."""
    advice = f"continue from {run.out_dir}/last.pt with --resume and a lower --learning-rate"
    if state.iter == 0 and run.cfg.init_from:
        advice = f"check the weights of {run.cfg.init_from}"
    elif state.iter == 0:  # the same command would give the same loss
        elsewhere = "" if run.machine.device.type == "cpu" else ", or try --device cpu"
        advice = f"look for a mistake in model.py if you changed it{elsewhere}"
    require_finite(val_loss, f"at iteration {state.iter}", advice + run.machine.or_float32)
    best = val_loss < state.best_val_loss
    state.val_loss, state.best_val_loss = val_loss, min(val_loss, state.best_val_loss)
    return best


def require_finite(val_loss: float, where: str, advice: str) -> None:
    if not math.isfinite(val_loss):
        raise UserError(f"the validation loss {where} is {val_loss}; {advice}")


def reevaluate_best(run: Run, state: TrainState, micro_batch: MicroBatch) -> None:
    """If a resumed run evaluates on other windows than before, evaluate best.pt on them: only losses on the same
    windows can be compared. Also if best.pt is newer than last.pt, which does not know its loss then: a full disk may
    have had room for only one of them. If best.pt is gone, the next evaluation writes it."""
    path, before, block_size = run.out_dir / "best.pt", run.val_windows_before, run.cfg.model.block_size
    if before is None:  # a new run
        return
    if not path.exists():
        state.best_val_loss = math.inf
        return
    saved = checkpoint.load(path, advice="; delete it, and the next evaluation writes a new one")
    is_newer = saved["iter"] > run.resumed_at
    if is_newer or before != len(run.val_windows):
        best = checkpoint.build_model(saved, str(path)).to(run.machine.device)
        state.best_val_loss = micro_batch.retry_smaller(evaluate, best, run.val_windows, run.machine)
        newer = f"is newer than last.pt (iteration {saved['iter']:,})"
        chosen = f"was chosen on {before * block_size:,} validation tokens"
        run.machine.print(f"best.pt {newer if is_newer else chosen};")
        run.machine.print(f"its loss on the {run.val_windows.tokens:,} used now is {state.best_val_loss:.4f}")


def sample_text(run: Run, state: TrainState, tokenizer: tiktoken.Encoding) -> str:
    """`sample_prompt` and the model's continuation. Has its own random numbers, so the run stays the same."""
    prompt = run.cfg.sample_prompt
    generator = torch.Generator(run.machine.device).manual_seed(run.cfg.seed + state.iter)
    try:
        return prompt + generate_text(state.model, tokenizer, prompt, SAMPLE_TOKENS, generator=generator, **SAMPLE)[0]
    except (UserError, RuntimeError, MemoryError) as error:  # no reason to end a run
        return f"no sample text: {first_line(error)}"


def eval_only(cfg: TrainConfig, machine: Machine) -> None:
    """Evaluate OUT_DIR/best.pt, or the model of `--init-from`, on the validation split of the data. Writes nothing."""
    if notice := device_notice(cfg.device, machine.device):
        machine.print(notice)
    meta = read_meta(cfg.data_dir)
    if cfg.init_from:
        name, tokenizer = cfg.init_from, read_tokenizer(cfg.data_dir, meta)
        sizes = dataclasses.replace(complete_config(cfg, meta, None).model, dropout=0.0)
        model = pretrained.initial_model(name, tokenizer, sizes)
    else:
        name = f"{cfg.out_dir}/best.pt"
        saved = checkpoint.load(name)
        check_tokenizer(saved, cfg, meta, f"--eval-only: {name}")
        name, model = f"{name}, iteration {saved['iter']:,}", checkpoint.build_model(saved, name)
    windows = ValidationWindows(TokenStream.open(cfg.data_dir, "val"), model.config.block_size, cfg.eval_tokens)
    cfg = dataclasses.replace(cfg, model=model.config)
    check_same_everywhere(cfg, meta, machine)
    machine.share_weights(model.to(machine.device))
    cfg = dataclasses.replace(cfg, tokens_per_iter=iteration_tokens(cfg, windows.tokens, machine.processes))
    micro_batch = MicroBatch(resolve_batch_size(cfg, machine).batch_size, model, machine)
    val_loss = micro_batch.retry_smaller(evaluate, model, windows, machine)
    require_finite(val_loss, f"of {name}", f"check its weights{machine.or_float32}")
    rows = {
        "model": name,
        "data": f"{cfg.data_dir}: {windows.tokens:,} tokens of the validation split",
        "device": f"{machine.name}, {machine.describe()['dtype']}",
        "loss": f"{val_loss:.4f} nats per token, {validation_row(val_loss, meta)['bits_per_byte']:.4f} bits per byte",
    }
    machine.print(lines(rows))


# ----------------------------------------------------------------------------------------------------------------------
# The command


def main(cfg: TrainConfig) -> None:
    start.reconfigure(sys.stdout, errors="replace")  # a character that the terminal lacks must not end a run
    try:
        cfg, kept = resume_settings(cfg)
        if os.environ.get("RANK", "0") == "0":
            for note in kept:
                print(printable(note))
        train(cfg)
        if cfg.check or cfg.eval_only:
            start.require_printed()
        leave_processes()
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            advice = held_by_others(0.5) or "take a smaller --batch-size, --block-size or model"
            raise UserError(f"out of memory; {advice}") from error
        if is_failed_exchange(error):
            raise UserError(why_exchange_failed(error)) from error
        raise


if __name__ == "__main__":
    start.run(lambda: main(CFG), interrupted="Stopped. Nothing was written.")  # in the loop, Ctrl-C saves first
