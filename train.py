"""Train a GPT-2 on a folder of token shards.

    python train.py                               the default model on data/wikipedia
    python train.py --resume                      go on where a stopped run stood, exactly
    python train.py --check                       will it fit, how long will it take? (writes nothing)
    torchrun --nproc-per-node 8 train.py          on several GPUs: the same run, sooner

In the order of this file: learning rate and optimizer; the state of a run, saved and restored; the forward and backward
pass of an iteration; evaluation; and `train`, the loop that puts them together. What is about this machine, and not
about training, is in machine.py.
"""

import contextlib
import dataclasses
import gc
import hashlib
import math
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import tiktoken
import torch
import torch.distributed as dist
from torch import Tensor

import checkpoint
import config
import data
import report
from config import TrainConfig, UserError
from export import import_gpt2
from generate import generate_text
from machine import (
    Machine,
    catch_signals,
    fit,
    is_lost_process,
    is_out_of_memory,
    let_first_speak,
    make_forward,
    make_machine,
    peak_memory,
    random_state,
    set_random_state,
)
from model import GPT

SAMPLE_TOKENS = 64  # of text at an evaluation

# ----------------------------------------------------------------------------------------------------------------------
# Learning rate and optimizer


def get_lr(it: int, cfg: TrainConfig) -> float:
    """The learning rate of iteration `it`: linear warm-up from near zero to `learning_rate`, then a cosine down to
    `min_lr` at `max_iters` (Loshchilov and Hutter, 2017; as GPT-3 and nanoGPT use it)."""
    if it < cfg.warmup:
        return cfg.learning_rate * (it + 1) / (cfg.warmup + 1)
    progress = (it - cfg.warmup) / (cfg.max_iters - cfg.warmup)  # 0 to 1
    return cfg.min_lr + (cfg.learning_rate - cfg.min_lr) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


class OneOptimizer(torch.optim.Optimizer):
    """Several optimizers, each of parameters of its own, as one: their groups and states side by side."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let each optimizer work on this one's groups and state, which loading replaces."""
        groups = iter(self.param_groups)
        for optimizer in self.optimizers:
            optimizer.param_groups = [next(groups) for _ in optimizer.param_groups]
            optimizer.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: None = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def make_optimizer(model: GPT, cfg: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """Muon (Jordan et al., 2024) for the matrices in the blocks, its steps scaled to the size of AdamW's (Liu et al.,
    2025), and AdamW (Loshchilov and Hutter, 2019) for the rest, or for all. Weight decay is on matrices only: biases and
    norms have no size to limit. A group's learning rate is `get_lr`'s times its `lr_scale`."""
    muon = [p for p in model.transformer.h.parameters() if p.dim() == 2 and cfg.optimizer == "muon"]
    others = [p for p in model.parameters() if all(p is not q for q in muon)]
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": cfg.weight_decay, "lr_scale": 1.0},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    adamw = torch.optim.AdamW(
        groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=device.type in ("cuda", "cpu")
    )
    if not muon:
        return adamw
    group = {"params": muon, "lr_scale": cfg.muon_lr_scale}
    return OneOptimizer(adamw, torch.optim.Muon([group], weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw"))


def initial_model(cfg: TrainConfig, meta: dict[str, Any]) -> GPT:
    """The model that a run starts from: random weights, or those of `--init-from`, which then decides the sizes."""
    if cfg.init_from:
        return import_gpt2(cfg.init_from, meta["tokenizer"], cfg.model)
    return GPT(cfg.model)


# ----------------------------------------------------------------------------------------------------------------------
# The state of a run


@dataclass
class TrainState:
    """All that a run changes, and so all that resuming needs. The place in the data follows from `tokens`."""

    model: GPT
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # keeps float16 gradients from vanishing; does nothing in other precisions
    iter: int = 0  # iterations done
    tokens: int = 0  # seen in them
    seconds: float = 0.0  # spent in them: evaluating and saving stop this clock
    val_loss: float = math.inf  # at the last evaluation
    best_val_loss: float = math.inf


def keep_dtype(machine: Machine, cfg: TrainConfig, saved: dict[str, Any]) -> Machine:
    """On a CPU `--dtype auto` is decided by a small timing, which may fall out otherwise another time: a resumed run
    keeps what it began with."""
    began = saved.get("machine", {})
    if cfg.dtype == "auto" and machine.device.type == "cpu" and began.get("device") == "cpu":
        return dataclasses.replace(machine, dtype=getattr(torch, began["dtype"]), why="as the run began")
    return machine


def describe_data(meta: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of the data it was trained on: enough to know it again, and to tell others."""
    hashes = [shard["sha256"] for split in ("train", "val") for shard in meta["splits"][split]["shards"]]
    return {
        "source": meta["source"],
        "sha256": hashlib.sha256("".join(hashes).encode()).hexdigest(),
        **{
            f"{split}_{what}": meta["splits"][split][what] for split in ("train", "val") for what in ("tokens", "bytes")
        },
    }


def save(state: TrainState, cfg: TrainConfig, meta: dict[str, Any], machine: Machine, best: bool) -> None:
    """Write last.pt, and best.pt before it where this is the best model so far. All processes call this."""
    rng: list[Any] = [random_state(machine.device)]
    if machine.processes > 1:
        rng = [None] * machine.processes
        dist.all_gather_object(rng, random_state(machine.device))
    if not machine.is_main:
        return
    generating = {
        "format": checkpoint.FORMAT,
        "model": state.model.state_dict(),
        "config": dataclasses.asdict(cfg),
        "tokenizer": meta["tokenizer"],
        "iter": state.iter,
        "tokens": state.tokens,
        "val_loss": state.val_loss,
        "data": describe_data(meta),
    }
    resuming = {
        "best_val_loss": state.best_val_loss,
        "seconds": state.seconds,
        "machine": machine.describe(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "rng": rng,
    }
    out_dir = Path(cfg.out_dir)
    if best:
        checkpoint.save(out_dir / "best.pt", generating)
    checkpoint.save(out_dir / "last.pt", generating | resuming)


def restore(state: TrainState, saved: dict[str, Any], machine: Machine) -> None:
    """Put a run back to where `last.pt` has it. Raises UserError where that is damaged."""
    # The moments are the saved run's; weight decay and betas are the command's, which may have changed them.
    groups = state.optimizer.state_dict()["param_groups"]
    try:
        state.model.load_state_dict(saved["model"])
        state.optimizer.load_state_dict({"state": saved["optimizer"]["state"], "param_groups": groups})
        if saved["scaler"]:  # a run in another precision than float16 has none
            state.scaler.load_state_dict(saved["scaler"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"last.pt is damaged: its state does not fit its model ({str(error).splitlines()[0]})"
        ) from error
    state.iter, state.tokens, state.seconds = saved["iter"], saved["tokens"], saved["seconds"]
    state.val_loss, state.best_val_loss = saved["val_loss"], saved["best_val_loss"]
    if machine.rank < len(saved["rng"]):  # a process that the saved run did not have keeps its fresh one
        set_random_state(saved["rng"][machine.rank], machine.device)


def check_resumable(
    saved: dict[str, Any], cfg: TrainConfig, meta: dict[str, Any], machine: Machine, path: Path
) -> list[str]:
    """What differs between the saved run and the command, in words: training fields, device, precision, threads.

    Raises:
        UserError: the model, the tokenizer or the data is not that of the saved run.
    """
    if missing := {"best_val_loss", "seconds", "machine", "optimizer", "scaler", "rng", "data"} - saved.keys():
        raise UserError(f"{path}: cannot be resumed from (without {', '.join(sorted(missing))})")
    if saved["tokenizer"] != meta["tokenizer"]:
        raise UserError(
            f"--resume: {path} was trained with the tokenizer {saved['tokenizer']}, but {cfg.data_dir} is prepared with "
            f"{meta['tokenizer']}; give the --data-dir of that run, or another --out-dir"
        )
    if saved["data"]["sha256"] != describe_data(meta)["sha256"]:
        raise UserError(
            f"--resume: {path} was trained on other data than {cfg.data_dir} holds; give the --data-dir of that run, or "
            "another --out-dir"
        )
    then, now = saved["config"] | saved["machine"], dataclasses.asdict(cfg) | machine.describe()
    if changed := [f for f in now["model"] if then["model"][f] != now["model"][f]]:
        values = ", ".join(f"--{f.replace('_', '-')} {then['model'][f]}, now {now['model'][f]}" for f in changed)
        raise UserError(f"--resume: {path} has another model ({values}); give its values, or another --out-dir")
    if then["optimizer"] != now["optimizer"]:
        raise UserError(
            f"--resume: {path} was trained with --optimizer {then['optimizer']}, whose state is of no use to "
            f"{now['optimizer']}; give that, or another --out-dir"
        )
    elsewhere = ("model", "preset", "data_dir", "out_dir", "resume", "auto_resume", "overwrite", "check", "eval_only")
    words = [f"{f} {then[f]} -> {now[f]}" for f in now if f not in elsewhere and f in then and then[f] != now[f]]
    if then["max_iters"] != now["max_iters"]:
        before, after = saved["optimizer"]["param_groups"][0]["lr"], get_lr(saved["iter"], cfg)
        words.append(f"learning rate {before:.2e} -> {after:.2e} here, as the cosine ends at {cfg.max_iters:,}")
    return words


# ----------------------------------------------------------------------------------------------------------------------
# One iteration


def forward_backward(
    forward: Callable[[Tensor, Tensor], Tensor],
    scaler: torch.amp.GradScaler,
    windows: data.TrainingWindows,
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
    windows: data.TrainingWindows,
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
def evaluate(model: GPT, windows: data.ValidationWindows, batch_size: int, machine: Machine) -> float:
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
        return data.load_tokenizer(meta["tokenizer"])
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


def check_unused(out_dir: Path) -> None:
    """Raises UserError where a new run would delete what an earlier one made."""
    if (out_dir / "last.pt").exists():
        raise UserError(
            f"--out-dir {out_dir} holds a run (last.pt); go on with it by --resume, delete it by --overwrite, or give "
            "another --out-dir"
        )
    # A run that was killed before its first last.pt may leave the untrained best.pt of iteration 0: no loss.
    best = out_dir / "best.pt"
    if best.exists() and checkpoint.load(best)["iter"] > 0:
        raise UserError(
            f"--out-dir {out_dir} holds a model (best.pt); delete it by --overwrite, or give another --out-dir"
        )


@contextlib.contextmanager
def claim(out_dir: Path, machine: Machine, fresh: bool) -> Iterator[None]:
    """Make `out_dir` this run's own: keep other trainings out of it, and of an earlier run delete what was left half
    done, or where a fresh run begins, everything. The system lifts the lock when the process ends, however it ends.

    Raises:
        UserError: another training is at work there, or the folder cannot be written to.
    """
    if not machine.is_main:
        yield
        return
    lock = filelock.FileLock(out_dir / ".lock")
    with config.writing(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
        try:
            with contextlib.suppress(NotImplementedError):  # a file system without locks
                lock.acquire(blocking=False)
        except filelock.Timeout as error:
            raise UserError(
                f"--out-dir {out_dir}: another training is at work there; give another --out-dir"
            ) from error
    try:
        with config.writing(out_dir):
            names = ["last.pt.tmp", "best.pt.tmp"]
            if fresh:
                names += ["last.pt", "best.pt", "metrics.jsonl", "loss.png"]
            for name in names:
                (out_dir / name).unlink(missing_ok=True)
        yield
    finally:
        lock.release()


# ----------------------------------------------------------------------------------------------------------------------
# Beside the run: --check and --eval-only, which write nothing


def preflight(
    cfg: TrainConfig,
    state: TrainState,
    forward: Callable[[Tensor, Tensor], Tensor],
    train_windows: data.TrainingWindows,
    val_windows: data.ValidationWindows,
    machine: Machine,
) -> None:
    """Verify the data, try an iteration and a piece of an evaluation, and say what the run will take.

    Raises:
        UserError: a shard is not what prepare_data.py wrote, or memory or disk will not do.
    """
    if machine.is_main:
        data.verify(cfg.data_dir)

    def iterate(numbers: list[range]) -> None:
        losses = forward_backward(forward, state.scaler, train_windows, numbers, machine)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()
        losses.tolist()  # waits for the device

    def attempt(batch_size: int) -> tuple[float, float]:
        numbers = micro_steps(state.tokens, cfg, batch_size, machine)
        tokens = batch_size * cfg.model.block_size * machine.processes
        piece = data.ValidationWindows(val_windows.stream, cfg.model.block_size, tokens)
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
    stream = data.TokenStream.open(cfg.data_dir, "val")
    windows = data.ValidationWindows(stream, model.config.block_size, cfg.eval_tokens)
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
    meta = data.read_meta(cfg.data_dir)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=meta["vocab_size"]))
    try:
        cfg.accumulation_steps(machine.processes)
    except ValueError as error:
        raise UserError(str(error)) from error
    if cfg.eval_only:
        return eval_only(cfg, meta, machine)
    block_size = cfg.model.block_size
    train_windows = data.TrainingWindows(data.TokenStream.open(cfg.data_dir, "train"), block_size, cfg.seed)
    val_windows = data.ValidationWindows(data.TokenStream.open(cfg.data_dir, "val"), block_size, cfg.eval_tokens)

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


def main() -> None:
    cfg = config.parse(TrainConfig, "Train a GPT-2 on a folder of token shards.")
    sys.stdout.reconfigure(errors="replace")  # a character that the terminal lacks must not end a run
    try:
        train(cfg)
        if dist.is_initialized():  # after a failure the others may hang in a collective, and so would this
            gc.collect()  # the model that the processes shared: while it holds their group, the group's threads live on
            dist.destroy_process_group()
    except KeyboardInterrupt:  # not in the loop: there it saves first
        if int(os.environ.get("RANK", 0)) == 0:
            print("Stopped. Nothing was written.", file=sys.stderr)
        sys.exit(130)  # as shells have it for a program that Ctrl-C stopped
    except UserError:
        let_first_speak()
        raise
    except RuntimeError as error:
        let_first_speak()
        if is_out_of_memory(error):
            raise UserError("out of memory; take a smaller --batch-size, --block-size or model") from error
        if is_lost_process(error):
            raise UserError(
                "another process of this run ended, which ends it; --resume goes on from last.pt"
            ) from error
        raise


if __name__ == "__main__":
    config.run(main)
