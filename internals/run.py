"""A training run: its fixed part (`Run`), its changing state (`TrainState`), and its folder.

open_run           configuration, data and machine -> a Run, new or resumed
save, restore      TrainState <-> best.pt and last.pt
lock_run_folder    one training at a time in OUT_DIR
"""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from config import NOT_SETTINGS, TrainConfig, flag_of
from internals import checkpoint, pretrained
from internals.batch_size import resolve_batch_size
from internals.files import locked, sha256_of, writing
from internals.machine import Machine
from internals.memory import random_state, set_random_state
from internals.optimizer import get_lr
from internals.processes import WRITING, require_same
from internals.run_folder import RUN_FILES, check_folder, check_own, check_source_stays, check_unused, check_writable
from internals.run_length import most_iterations, resolve_as_before, resolve_auto
from internals.settings import differences, upgrade, with_settings
from internals.shards import SPLITS, read_meta, read_tokenizer
from internals.start import UserError
from internals.tokenizer import tokenizer_name
from internals.windows import TokenStream, TrainingWindows, ValidationWindows
from model import GPT


@dataclass(frozen=True)
class Run:
    """Everything that stays the same from the first iteration to the last."""

    cfg: TrainConfig  # complete: a number for each `auto`, the data's vocab_size, the sizes of --init-from
    meta: dict[str, Any]  # the data's meta.json
    machine: Machine
    train_windows: TrainingWindows
    val_windows: ValidationWindows
    resumed_at: int | None = None  # iteration; None: a new run
    changes: tuple[str, ...] = ()  # what differs from the saved run, in words
    val_windows_before: int | None = None  # how many the saved run evaluated on
    chosen: tuple[str, ...] = ()  # what a new run chose for `auto` and --max-epochs, in words

    @property
    def out_dir(self) -> Path:
        return Path(self.cfg.out_dir)

    @property
    def batch_size(self) -> int:
        """Sequences in a micro-step of each process, as long as memory does not run out."""
        return self.cfg.micro_batch_size(self.machine.processes)

    @functools.cached_property
    def tokenizer(self) -> str:
        """The data's tokenizer, as `load_tokenizer` takes it."""
        return read_tokenizer(self.cfg.data_dir, self.meta)

    def window_ids(self, tokens: int, batch_size: int) -> list[range]:
        """This process's training windows in one iteration: a range of ids for each micro-step.

        `tokens` counts those seen before. With 2 processes, windows of 256 tokens and 2,048 tokens an iteration:
        `window_ids(tokens=2048, batch_size=2) -> [range(8, 10), range(12, 14)]` in process 0.
        """
        block_size, batch = self.cfg.model.block_size, self.machine.processes * batch_size
        first, count = tokens // block_size, self.cfg.tokens_per_iter // block_size
        begin = first + self.machine.rank * batch_size
        return [range(n, n + batch_size) for n in range(begin, first + count, batch)]


@dataclass
class TrainState:
    """Everything that a run changes, except the random state, which `save` stores beside it. The place in the data follows
    from `tokens`."""

    model: GPT
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # keeps float16 gradients from vanishing; does nothing in other precisions
    iter: int = 0  # iterations done
    tokens: int = 0  # seen in them
    seconds: float = 0.0  # spent in them, without evaluating and saving
    val_loss: float = math.inf  # at the last evaluation
    best_val_loss: float = math.inf


# ----------------------------------------------------------------------------------------------------------------------
# New or resumed


def open_run(cfg: TrainConfig, machine: Machine, saved: dict[str, Any] | None) -> Run:
    """The run that the command asks for: a new one, or the one of `saved` (the content of last.pt).

    Raises:
        UserError: the data is not ready, or `saved` belongs to another model, tokenizer or text.
    """
    if saved and not Path(cfg.data_dir).is_dir():  # read_meta would only say to prepare it
        raise UserError(
            f"--data-dir {cfg.data_dir}: there is no such folder ({os.path.abspath(cfg.data_dir)}). The run was started with "
            f"--data-dir {saved['config'].get('data_dir', cfg.data_dir)}; give the path to that folder, or prepare it again if it "
            "is gone"
        )
    meta = read_meta(cfg.data_dir)
    cfg = complete_config(cfg, meta, saved)
    train_windows = TrainingWindows(TokenStream.open(cfg.data_dir, "train"), cfg.model.block_size, cfg.seed)
    val_windows = ValidationWindows(TokenStream.open(cfg.data_dir, "val"), cfg.model.block_size, cfg.eval_tokens)
    check_same_everywhere(cfg, meta, machine)
    epoch_tokens = train_windows.epoch_tokens
    if saved is None:
        cfg, chosen = resolve_auto(cfg, epoch_tokens, machine.processes)
        check_together(cfg, machine)
        return Run(resolve_batch_size(cfg, machine), meta, machine, train_windows, val_windows, chosen=chosen)
    cfg = resolve_as_before(cfg, saved["config"])
    check_together(cfg, machine)
    length = saved["config"]["max_iters"]
    if cfg.auto_resume and cfg.max_iters > length:  # a longer run, within --max-epochs
        cfg = dataclasses.replace(cfg, max_iters=max(length, most_iterations(cfg, epoch_tokens)))
    cfg = resolve_batch_size(cfg, machine)
    machine = keep_dtype(machine, cfg, saved)
    changes = check_same_run(saved, cfg, meta, machine)
    eval_tokens = saved["config"].get("eval_tokens", cfg.eval_tokens)
    before = len(ValidationWindows(val_windows.stream, cfg.model.block_size, eval_tokens))
    return Run(
        cfg, meta, machine, train_windows, val_windows,
        resumed_at=saved["iter"], changes=changes, val_windows_before=before,
    )  # fmt: skip


def check_together(cfg: TrainConfig, machine: Machine) -> None:
    """Raise UserError if settings contradict each other, or the number of processes."""
    try:
        cfg.check_together()
        cfg.sequences_per_process(machine.processes)
    except ValueError as error:
        raise UserError(str(error)) from error


def check_same_everywhere(cfg: TrainConfig, meta: dict[str, Any], machine: Machine) -> None:
    """Raise UserError if another process has other settings or another text."""
    if machine.processes == 1:
        return
    may_differ = {"preset", "data_dir", "out_dir", "overwrite", "config", "device", "dtype"}
    settings = {name: value for name, value in cfg.settings().items() if name not in may_differ}
    settings |= {**settings.pop("model"), "device": machine.device.type, "data": describe_data(meta)["sha256"]}
    require_same(settings)


def complete_config(cfg: TrainConfig, meta: dict[str, Any], saved: dict[str, Any] | None) -> TrainConfig:
    """`cfg` with what others decide: the data has the tokenizer, and so vocab_size; `--init-from` has the sizes.

    Raises:
        UserError: a flag asks for another model than that of `--init-from`.
    """
    model = dataclasses.replace(cfg.model, vocab_size=meta["vocab_size"])
    if cfg.init_from and saved:
        sizes = {name: saved["config"]["model"][name] for name in ("n_layer", "n_head", "n_embd", "n_inner")}
        model = dataclasses.replace(model, **sizes)
    elif cfg.init_from:
        model = pretrained.initial_config(cfg.init_from, read_tokenizer(cfg.data_dir, meta), model)
    if cfg.init_from:
        pretrained.refuse_other_flags(cfg.model, model)
    return dataclasses.replace(cfg, model=model)


def initial_model(run: Run) -> GPT:
    """The model that a new run starts from: random weights, or those of `--init-from`."""
    if run.cfg.init_from and run.resumed_at is None:
        return pretrained.initial_model(run.cfg.init_from, run.tokenizer, run.cfg.model)
    return GPT(run.cfg.model)


def load_resumable(cfg: TrainConfig, machine: Machine) -> dict[str, Any] | None:
    """The content of last.pt if the command resumes a run, None if it starts one.

    Raises:
        UserError: there is nothing to resume, or a new run would overwrite an old one or its own source.
    """
    out_dir = Path(cfg.out_dir)
    check_folder(out_dir)
    last = out_dir / "last.pt"
    saved = checkpoint.load_last(last) if (cfg.resume or cfg.auto_resume) and last.exists() else None
    if len(machine.gather(torch.tensor([saved["iter"] if saved else -1])).unique()) > 1:
        raise UserError(f"--out-dir {out_dir}: the processes see different files there; all machines must share it")
    if cfg.resume and not saved:
        runs = sorted(str(path.parent) for path in out_dir.parent.glob("*/last.pt"))
        others = f"give the --preset or --out-dir of one of these: {', '.join(runs[:5])}; or " if runs else ""
        raise UserError(f"--resume: there is no run in {out_dir} (no last.pt); {others}leave --resume out to start one")
    needed = {"best_val_loss", "seconds", "machine", "optimizer", "scaler", "rng", "data"}
    if saved and (missing := needed - saved.keys()):
        raise UserError(f"{last}: cannot be resumed from (missing: {', '.join(sorted(missing))})")
    if not cfg.check:
        check_own(out_dir)
        if not (saved or cfg.overwrite):
            check_unused(out_dir)
        if machine.is_main:
            check_writable(out_dir)
    if cfg.overwrite:
        check_source_stays(cfg.init_from, out_dir)
    return saved


def keep_dtype(machine: Machine, cfg: TrainConfig, saved: dict[str, Any]) -> Machine:
    """On a CPU, a resumed run with `--dtype auto` keeps the dtype that it began with, whatever this CPU is best at."""
    began = saved["machine"]
    if cfg.dtype == "auto" and machine.device.type == "cpu" and began["device"] == "cpu":
        return dataclasses.replace(machine, dtype=getattr(torch, began["dtype"]), dtype_reason="as in the run so far")
    return machine


def check_same_run(saved: dict[str, Any], cfg: TrainConfig, meta: dict[str, Any], machine: Machine) -> tuple[str, ...]:
    """What differs between the saved run and the command, in words: settings, device, precision, threads.

    Raises:
        UserError: the model, the optimizer, the tokenizer or the data is not the saved run's.
    """
    last = f"--{'resume' if cfg.resume else 'auto-resume'}: {cfg.out_dir}/last.pt"
    check_tokenizer(saved, cfg, meta, last)
    if saved["data"]["sha256"] != describe_data(meta)["sha256"]:
        raise UserError(
            f"{last} was trained on other data than {cfg.data_dir} holds; give the --data-dir of that run, or another "
            "--out-dir"
        )
    changed = differences(upgrade(saved["config"]), cfg.settings(), cfg.settings())
    if model := {name: changed[name] for name in vars(cfg.model) if name in changed}:
        values = ", ".join(f"{flag_of(name)} {old}, now {new}" for name, (old, new) in model.items())
        raise UserError(f"{last} has another model ({values}); give its values, or another --out-dir")
    if "optimizer" in changed:
        old, new = changed["optimizer"]
        raise UserError(
            f"{last} was trained with --optimizer {old}, whose state {new} cannot use; give --optimizer {old}, "
            "or another --out-dir"
        )
    if "init_from" in changed:
        old, new = (repr(name) if name else "random weights" for name in changed["init_from"])
        raise UserError(f"{last} started from {old}, not from {new}; leave --init-from out, or give another --out-dir")
    done, last_iter = saved["iter"], saved["config"]["max_iters"]
    if cfg.max_iters <= done < last_iter:
        raise UserError(
            f"--max-iters {cfg.max_iters:,}: the run in {cfg.out_dir} has done {done:,} iterations; give more"
        )
    machines = differences(saved["machine"], machine.describe(), machine.describe())
    changed |= {name: values for name, values in machines.items() if None not in values}  # a GPU has no threads
    words = [f"{name} {old} -> {new}" for name, (old, new) in changed.items() if name not in NOT_SETTINGS]
    if "max_iters" in changed:
        before, after = get_lr(done, with_settings(cfg, saved["config"])), get_lr(done, cfg)
        words.append(f"learning rate {before:.2e} -> {after:.2e} here (the cosine now ends at {cfg.max_iters:,})")
    return tuple(words)


def check_tokenizer(saved: dict[str, Any], cfg: TrainConfig, meta: dict[str, Any], name: str) -> None:
    """Raise UserError if a checkpoint (`name` in the message) was trained with another tokenizer than the data's."""
    tokenizer = read_tokenizer(cfg.data_dir, meta)
    if saved["tokenizer"] != tokenizer:
        raise UserError(
            f"{name} was trained with the tokenizer {tokenizer_name(saved['tokenizer'])}, but {cfg.data_dir} is prepared with "
            f"{tokenizer_name(tokenizer)}; give the --data-dir of that run, or if its text has been replaced since, prepare the "
            "old one again, or start a new run in another --out-dir"
        )


# ----------------------------------------------------------------------------------------------------------------------
# The checkpoints of a run


def save(run: Run, state: TrainState, best: bool) -> None:
    """Write last.pt, and best.pt before it if this is the best model so far. All processes call this."""
    machine = run.machine
    rng: list[Any] = [random_state(machine.device)]
    if machine.processes > 1:
        rng = [None] * machine.processes
        dist.all_gather_object(rng, random_state(machine.device))
    if not machine.is_main:
        return
    generating = {
        "format": checkpoint.FORMAT,
        "model": state.model.state_dict(),
        "config": run.cfg.settings(),
        "tokenizer": run.tokenizer,
        "iter": state.iter,
        "tokens": state.tokens,
        "val_loss": state.val_loss,
        "data": describe_data(run.meta),
    }
    resuming = {
        "best_val_loss": state.best_val_loss,
        "seconds": state.seconds,
        "machine": machine.describe(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "rng": rng,
    }
    with WRITING:
        if best:
            checkpoint.save(run.out_dir / "best.pt", generating)
        checkpoint.save(run.out_dir / "last.pt", generating | resuming)


def restore(state: TrainState, saved: dict[str, Any], machine: Machine) -> None:
    """Restore `state` and this process's random numbers from last.pt."""
    # The moments come from the saved run. Weight decay and betas come from the command, which may have changed them.
    groups = state.optimizer.state_dict()["param_groups"]
    with checkpoint.fitting("last.pt is damaged: its state does not fit its model"):
        state.model.load_state_dict(saved["model"])
        state.optimizer.load_state_dict({"state": saved["optimizer"]["state"], "param_groups": groups})
        if saved["scaler"]:  # a run in another precision than float16 has none
            state.scaler.load_state_dict(saved["scaler"])
    state.iter, state.tokens, state.seconds = saved["iter"], saved["tokens"], saved["seconds"]
    state.val_loss, state.best_val_loss = saved["val_loss"], saved["best_val_loss"]
    if machine.rank < len(saved["rng"]):  # a process that the saved run did not have keeps its fresh random numbers
        set_random_state(saved["rng"][machine.rank], machine.device)


def describe_data(meta: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's record of its training text: enough to recognise it, and to tell others about it."""
    splits = {split: meta["splits"][split] for split in SPLITS}
    hashes = "".join(shard["sha256"] for split in splits.values() for shard in split["shards"])
    sizes = {f"{name}_{what}": split[what] for name, split in splits.items() for what in ("tokens", "bytes")}
    return {"source": meta["source"], "sha256": sha256_of(hashes), **sizes}


# ----------------------------------------------------------------------------------------------------------------------
# The folder of a run


@contextlib.contextmanager
def lock_run_folder(run: Run) -> Iterator[None]:
    """Lock `out_dir` for this run. Deletes half-written files there.

    Raises:
        UserError: another command uses the folder, or has trained there since this one looked.
    """
    if not run.machine.is_main:
        yield
        return
    held = "another training run is using it; wait until it ends, or give another --out-dir"
    with locked(run.out_dir, "--out-dir", held):
        if run.resumed_at is None:
            if not run.cfg.overwrite:
                check_unused(run.out_dir)
        elif checkpoint.load(run.out_dir / "last.pt", mmap=True)["iter"] != run.resumed_at:
            raise UserError(f"--out-dir {run.out_dir}: another command has trained there meanwhile; repeat this one")
        with writing(run.out_dir):
            for name in RUN_FILES:
                (run.out_dir / f"{name}.tmp").unlink(missing_ok=True)
        yield
