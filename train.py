"""Train a GPT-2 on a folder of token shards.

    python train.py                               the default model on data/wikipedia
    python train.py --resume                      go on where a stopped run stood, exactly
    python train.py --check                       will it fit, how long will it take? (writes nothing)
    torchrun --nproc-per-node 8 train.py          on several GPUs: the same run, sooner

In the order of this file: learning rate and optimizer; the state of a run, saved and restored; the forward and backward
pass of an iteration; evaluation; and `train`, the loop that puts them together. What is about this machine, and not
about training, is in machine.py.
"""

from internals import start

if __name__ == "__main__":
    start.begin()  # mistakes and --help are answered at once: PyTorch takes seconds to import

    from config import TrainConfig
    from internals.cli import parse

    CFG = parse(TrainConfig, "Train a GPT-2 on a folder of token shards.")

import contextlib
import dataclasses
import gc
import math
import shutil
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiktoken
import torch
import torch.distributed as dist
from torch import Tensor

from config import TrainConfig
from generate import generate_text
from internals import checkpoint, report
from internals.machine import (
    Machine,
    catch_signals,
    fit,
    is_lost_process,
    is_out_of_memory,
    make_forward,
    make_machine,
    peak_memory,
)
from internals.optimizer import get_lr, make_optimizer
from internals.run import (
    TrainState,
    check_resumable,
    check_unused,
    claim,
    describe_data,
    initial_model,
    keep_dtype,
    restore,
    save,
)
from internals.shards import read_meta, verify
from internals.start import UserError
from internals.tokenizer import load_tokenizer
from internals.windows import TokenStream, TrainingWindows, ValidationWindows
from model import GPT

SAMPLE_TOKENS = 64  # of text at an evaluation

# ----------------------------------------------------------------------------------------------------------------------
# Learning rate and optimizer


# ----------------------------------------------------------------------------------------------------------------------
# The state of a run


# ----------------------------------------------------------------------------------------------------------------------
# One iteration


def forward_backward(
    forward: Callable[[Tensor, Tensor], Tensor],
    scaler: torch.amp.GradScaler,
    windows: TrainingWindows,
    numbers: list[range],
    machine: Machine,
) -> Tensor:
    """The gradient of the mean loss over all micro-steps (and processes), into `.grad`.

    Args:
        numbers: for each micro-step, the sequence numbers of its windows.

    Returns:
        (len(numbers),) the loss of each micro-step, on the device: nothing here waits for it.
    """
    losses = []
    for micro_step, batch in enumerate(numbers, start=1):
        inputs, targets = machine.windows(windows.batch(batch))
        # Gradients travel between processes once, with the last micro-step's.
        silent = machine.processes > 1 and micro_step < len(numbers)
        with forward.no_sync() if silent else contextlib.nullcontext():
            with machine.autocast():
                loss = forward(inputs, targets)
            scaler.scale(loss / len(numbers)).backward()
        losses.append(loss.detach())
    return torch.stack(losses)


def micro_steps(tokens: int, cfg: TrainConfig, batch_size: int, machine: Machine) -> list[range]:
    """Which windows are this process's in the iteration that begins when the run has seen so many tokens: their
    sequence numbers, a range for each micro-step."""
    first = tokens // cfg.model.block_size
    end, stride = first + cfg.tokens_per_iter // cfg.model.block_size, machine.processes * batch_size
    return [range(n, n + batch_size) for n in range(first + machine.rank * batch_size, end, stride)]


def non_finite(
    losses: list[float],
    norm: float,
    state: TrainState,
    cfg: TrainConfig,
    batch_size: int,
    windows: TrainingWindows,
) -> UserError:
    """The report on a loss or a gradient that is no number: where, when, and on which text."""
    bad = [n for n, loss in enumerate(losses) if not math.isfinite(loss)]
    first = state.tokens // cfg.model.block_size
    groups = [range(first + n * batch_size, first + (n + 1) * batch_size) for n in (bad or range(len(losses)))]
    starts = [str(windows.start(number)) for group in groups for number in group]
    shown = ", ".join(starts[:8]) + (f" and {len(starts) - 8} more" if len(starts) > 8 else "")
    what = f"the loss of micro-step {bad[0] + 1} of {len(losses)}" if bad else "the gradient"
    return UserError(
        f"{what} is not finite in iteration {state.iter + 1} (learning rate {get_lr(state.iter, cfg):.3g}, gradient norm "
        f"{norm:.3g}). The weights were not changed. The batch: windows of {cfg.model.block_size} tokens of the training "
        f"split that begin at token {shown}. Go on from the last good checkpoint, {cfg.out_dir}/last.pt, with --resume "
        "and a lower --learning-rate, or --dtype float32"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(model: GPT, windows: ValidationWindows, batch_size: int, machine: Machine) -> float:
    """The mean loss over the validation windows in nats per token, shared out among the processes."""
    model.eval()
    total = torch.zeros(1, device=machine.device)
    begin, end = (len(windows) * (machine.rank + n) // machine.processes for n in (0, 1))
    for first in range(begin, end, batch_size):
        last = min(first + batch_size, end)
        inputs, targets = machine.windows(windows.batch(first, last))
        with machine.autocast():
            total += model(inputs, targets) * (last - first)
    model.train()
    return machine.gather(total).sum().item() / len(windows)


def validation_row(val_loss: float, meta: dict[str, Any]) -> dict[str, float]:
    """The loss in three units. A byte's share of a token is that of the whole validation split."""
    split = meta["splits"]["val"]
    return {
        "val_loss": val_loss,
        "perplexity": math.exp(min(val_loss, 700)),  # a float holds no more; a run that diverged may ask for it
        "bits_per_byte": val_loss / math.log(2) * split["tokens"] / split["bytes"],
    }


def sampler(meta: dict[str, Any], machine: Machine) -> tiktoken.Encoding | None:
    """The data's tokenizer, for samples of text. Training does without it, and goes on where it cannot be had."""
    if not machine.is_main:
        return None
    try:
        return load_tokenizer(meta["tokenizer"])
    except UserError as error:
        machine.print(f"Evaluations show no text: {error}")
        return None


def sample_text(state: TrainState, cfg: TrainConfig, tokenizer: tiktoken.Encoding, machine: Machine) -> str:
    """How the model continues `sample_prompt`. The random numbers are its own: a run is the same with and without."""
    generator = torch.Generator(machine.device).manual_seed(cfg.seed + state.iter)
    options = {"temperature": 0.8, "top_k": 200, "generator": generator}
    text = cfg.sample_prompt + generate_text(state.model, tokenizer, cfg.sample_prompt, SAMPLE_TOKENS, **options)[0]
    # An untrained model of bytes writes control characters too, which a terminal would obey.
    text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
    return textwrap.indent(text.strip(), "    ")


# ----------------------------------------------------------------------------------------------------------------------
# The folder of the run


# ----------------------------------------------------------------------------------------------------------------------
# Beside the run: --check and --eval-only, which write nothing


def preflight(
    cfg: TrainConfig,
    state: TrainState,
    forward: Callable[[Tensor, Tensor], Tensor],
    train_windows: TrainingWindows,
    val_windows: ValidationWindows,
    machine: Machine,
) -> None:
    """Verify the data, try an iteration and a piece of an evaluation, and say what the run will take.

    Raises:
        UserError: a shard is not what prepare_data.py wrote, or memory or disk will not do.
    """
    if machine.is_main:
        verify(cfg.data_dir)

    def iterate(numbers: list[range]) -> None:
        losses = forward_backward(forward, state.scaler, train_windows, numbers, machine)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()
        losses.tolist()  # waits for the device

    def attempt(batch_size: int) -> tuple[float, float]:
        numbers = micro_steps(state.tokens, cfg, batch_size, machine)
        tokens = batch_size * cfg.model.block_size * machine.processes
        piece = ValidationWindows(val_windows.stream, cfg.model.block_size, tokens)
        # The first of each takes longer: kernels are loaded, buffers and the optimizer's moments made
        iterate(numbers[:1])
        evaluate(state.model, piece, batch_size, machine)
        times = [time.perf_counter()]
        iterate(numbers)
        times.append(time.perf_counter())
        evaluate(state.model, piece, batch_size, machine)
        times.append(time.perf_counter())
        return times[1] - times[0], (times[2] - times[1]) * len(val_windows) / len(piece)

    (iteration_seconds, evaluation_seconds), batch_size = fit(attempt, cfg.batch_size, state.model, machine)
    evaluations = 1 + math.ceil(cfg.max_iters / cfg.eval_interval)
    total = cfg.max_iters * iteration_seconds + evaluations * evaluation_seconds
    weights = sum(p.numel() * p.element_size() for p in state.model.parameters())
    disk = 7 * weights  # best.pt 1, last.pt 3 (AdamW's two moments), and a new last.pt beside the old one
    flops = state.model.flops_per_token()
    machine.print(
        report.preflight(
            cfg, batch_size, iteration_seconds, evaluation_seconds, total, peak_memory(machine), disk, flops, machine
        )
    )
    out_dir = Path(cfg.out_dir).absolute()
    free = shutil.disk_usage(next(folder for folder in (out_dir, *out_dir.parents) if folder.exists())).free
    free += sum(path.stat().st_size for path in out_dir.glob("*.pt"))  # an earlier run's, which this one replaces
    if free < disk:
        raise UserError(
            f"--out-dir {cfg.out_dir}: checkpoints need {report.size(disk)}, but only {report.size(free)} are free there"
        )
    machine.print("All of this fits.")


def eval_only(cfg: TrainConfig, meta: dict[str, Any], machine: Machine) -> None:
    """Evaluate OUT_DIR/best.pt, or the model of --init-from, on the validation split of the data.

    Raises:
        UserError: there is no such model, or it has another tokenizer than the data.
    """
    if cfg.init_from:
        name, iteration, model = cfg.init_from, 0, initial_model(cfg, meta)
    else:
        name = f"{cfg.out_dir}/best.pt"
        saved = checkpoint.load(name)
        if saved["tokenizer"] != meta["tokenizer"]:
            raise UserError(
                f"--eval-only: {name} uses the tokenizer {saved['tokenizer']}, but {cfg.data_dir} is prepared with "
                f"{meta['tokenizer']}; give the --data-dir of that run"
            )
        iteration, model = saved["iter"], checkpoint.build_model(saved)
    model.to(machine.device)
    stream = TokenStream.open(cfg.data_dir, "val")
    windows = ValidationWindows(stream, model.config.block_size, cfg.eval_tokens)
    val_loss, _ = fit(lambda n: evaluate(model, windows, n, machine), cfg.batch_size, model, machine)
    machine.print(
        f"{name} on {len(windows) * model.config.block_size:,} tokens of the validation split of {cfg.data_dir}, on "
        f"{machine.name} in {machine.describe()['dtype']}"
    )
    machine.print(report.evaluation(iteration, validation_row(val_loss, meta)))


# ----------------------------------------------------------------------------------------------------------------------
# The run


def train(cfg: TrainConfig) -> None:
    """Train as `cfg` says, from the start or from `last.pt`.

    Raises:
        UserError: whatever can be foreseen to go wrong.
    """
    machine = make_machine(cfg)
    out_dir = Path(cfg.out_dir)

    # Data: the tokenizer, and with it vocab_size, is the data's
    meta = read_meta(cfg.data_dir)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=meta["vocab_size"]))
    try:
        cfg.accumulation_steps(machine.processes)
    except ValueError as error:
        raise UserError(str(error)) from error
    if cfg.eval_only:
        return eval_only(cfg, meta, machine)
    block_size = cfg.model.block_size
    train_windows = TrainingWindows(TokenStream.open(cfg.data_dir, "train"), block_size, cfg.seed)
    val_windows = ValidationWindows(TokenStream.open(cfg.data_dir, "val"), block_size, cfg.eval_tokens)

    # An earlier run in out_dir
    last, saved, changed = out_dir / "last.pt", None, []
    if cfg.resume or (cfg.auto_resume and last.exists()):
        if not last.exists():
            raise UserError(f"--resume: there is no run in {out_dir} (no last.pt); leave --resume out to start one")
        saved = checkpoint.load(last)
        if cfg.init_from:  # which decided the sizes when the run began
            sizes = {f: saved["config"]["model"][f] for f in ("n_layer", "n_head", "n_embd", "n_inner")}
            cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **sizes))
        machine = keep_dtype(machine, cfg, saved)
        changed = check_resumable(saved, cfg, meta, machine, last)
    elif not (cfg.overwrite or cfg.check):
        check_unused(out_dir)
    resumed_at = saved["iter"] if saved else None
    seen = torch.tensor([-1 if resumed_at is None else resumed_at], device=machine.device)
    if len(machine.gather(seen).unique()) > 1:
        raise UserError(
            f"--out-dir {out_dir}: the processes see different files there; it must be shared by all machines"
        )
    if resumed_at is not None and resumed_at >= cfg.max_iters:
        machine.print(f"The run in {out_dir} is finished ({resumed_at:,} iterations). --max-iters extends it.")
        return

    # Model and optimizer
    torch.manual_seed(cfg.seed)  # the same weights in every process
    model = GPT(cfg.model) if saved else initial_model(cfg, meta)
    cfg = dataclasses.replace(cfg, model=model.config)
    model.to(machine.device)
    optimizer = make_optimizer(model, cfg, machine.device)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    state = TrainState(model, optimizer, scaler)
    forward, compiling = make_forward(model, cfg, machine)
    torch.manual_seed(cfg.seed + machine.rank)  # dropout of its own in every process
    if saved is not None:
        restore(state, saved, machine)
        del saved
    reference = report.reference(cfg, describe_data(meta)["sha256"])
    machine.print(
        report.startup(cfg, meta, state, machine, compiling, train_windows, val_windows, resumed_at, changed, reference)
    )
    if cfg.check:
        return preflight(cfg, state, forward, train_windows, val_windows, machine)

    # The loop
    tokenizer = sampler(meta, machine)
    with (
        catch_signals(machine) as stop,
        claim(out_dir, machine, fresh=resumed_at is None),
        contextlib.closing(report.RunLog(cfg, state, machine, reference)) as log,
    ):
        stopping = False
        batch_size = cfg.batch_size  # the one in force: smaller where memory runs out
        while True:
            finished = state.iter == cfg.max_iters
            if state.iter != resumed_at:  # there, all this was done before the run was stopped
                evaluating = state.iter % cfg.eval_interval == 0 or finished
                best = False
                if evaluating:
                    state.val_loss, batch_size = fit(
                        lambda n: evaluate(model, val_windows, n, machine), batch_size, model, machine
                    )
                    if not math.isfinite(state.val_loss):
                        raise UserError(
                            f"the validation loss at iteration {state.iter} is {state.val_loss}; {last} holds the run as it "
                            "stood before. Go on from there with --resume and a lower --learning-rate, or --dtype float32"
                        )
                    best = state.val_loss < state.best_val_loss
                    state.best_val_loss = min(state.val_loss, state.best_val_loss)
                if evaluating or state.iter % cfg.log_interval == 0 or state.iter == 1:
                    log.row(state, validation_row(state.val_loss, meta) if evaluating else None, best)
                if evaluating and tokenizer:
                    machine.print(sample_text(state, cfg, tokenizer, machine))
                if evaluating or state.iter % cfg.checkpoint_interval == 0 or stopping:
                    save(state, cfg, meta, machine, best)
            if finished or stopping:
                break

            begin = time.perf_counter()
            learning_rate = get_lr(state.iter, cfg)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group["lr_scale"]

            def gradients(batch_size: int) -> Tensor:
                numbers = micro_steps(state.tokens, cfg, batch_size, machine)
                return forward_backward(forward, scaler, train_windows, numbers, machine)

            losses, batch_size = fit(gradients, batch_size, model, machine)
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)

            # The one moment of an iteration when the program waits for the device, and the processes for each other
            told = torch.cat([losses, torch.stack([norm, torch.full_like(norm, stop.is_set())])])
            *losses, norms, stops = machine.gather(told).T.tolist()  # (micro-steps + 2, processes)
            losses, grad_norm, stopping = [loss for row in losses for loss in row], norms[0], any(stops)
            train_loss = sum(losses) / len(losses)
            # In float16 an overflow is the scaler's: it skips the step and halves the scale, until that is 1
            if not math.isfinite(train_loss) or not (
                math.isfinite(grad_norm) or (scaler.is_enabled() and scaler.get_scale() > 1)
            ):
                raise non_finite(losses, grad_norm, state, cfg, batch_size, train_windows)

            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            seconds = time.perf_counter() - begin
            state.iter, state.tokens = state.iter + 1, state.tokens + cfg.tokens_per_iter
            state.seconds += seconds
            log.iteration(train_loss, learning_rate, grad_norm, seconds)

    if finished:
        machine.print(f"Done. Best validation loss {state.best_val_loss:.4f}: {out_dir / 'best.pt'}")
    else:
        machine.print(f"Stopped after iteration {state.iter:,}, as asked. --resume goes on from there.")


def main(cfg: TrainConfig) -> None:
    sys.stdout.reconfigure(errors="replace")  # a character that the terminal lacks must not end a run
    try:
        train(cfg)
        if dist.is_initialized():  # after a failure the others may hang in a collective, and so would this
            gc.collect()  # the model that the processes shared: while it holds their group, the group's threads live on
            dist.destroy_process_group()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise UserError("out of memory; take a smaller --batch-size, --block-size or model") from error
        if is_lost_process(error):
            raise UserError(
                "another process of this run ended, which ends it; --resume goes on from last.pt"
            ) from error
        raise


if __name__ == "__main__":
    start.run(lambda: main(CFG), interrupted="Stopped. Nothing was written.")  # in the loop Ctrl-C saves first
