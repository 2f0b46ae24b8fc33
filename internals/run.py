"""A run: its state, and its folder."""

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import torch
import torch.distributed as dist

from config import TrainConfig
from internals import checkpoint, files
from internals.huggingface import import_gpt2
from internals.machine import Machine, random_state, set_random_state
from internals.optimizer import get_lr
from internals.start import UserError
from model import GPT


def initial_model(cfg: TrainConfig, meta: dict[str, Any]) -> GPT:
    """The model that a run starts from: random weights, or those of `--init-from`, which then decides the sizes."""
    if cfg.init_from:
        return import_gpt2(cfg.init_from, meta["tokenizer"], cfg.model)
    return GPT(cfg.model)


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
    with files.writing(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
        try:
            with contextlib.suppress(NotImplementedError):  # a file system without locks
                lock.acquire(blocking=False)
        except filelock.Timeout as error:
            raise UserError(
                f"--out-dir {out_dir}: another training is at work there; give another --out-dir"
            ) from error
    try:
        with files.writing(out_dir):
            names = ["last.pt.tmp", "best.pt.tmp"]
            if fresh:
                names += ["last.pt", "best.pt", "metrics.jsonl", "loss.png"]
            for name in names:
                (out_dir / name).unlink(missing_ok=True)
        yield
    finally:
        lock.release()
