"""The overhead of train.py over a bare loop of the same model, batch and dtype: logging, checks, reading data, saving.

    python benchmarks/overhead.py --max-iters 20 --tokens-per-iter 8192 --batch-size 16 --checkpoint-interval 10

It takes every flag of train.py. The bare loop has its batch on the device already. It only does forward, backward,
clipping and the optimizer's step. train.py runs unchanged in a temporary folder, with --preset demo on its text, else
on random tokens. Its seconds are the wall-clock time of the whole loop. They include the saves of last.pt (every
--checkpoint-interval iterations, and at the end) and the rows of metrics.jsonl. Evaluations, with their sample and
loss.png, are excluded because both loops would need them. The two take turns in this process for several rounds; the
ratio is the median over the rounds.
"""

import contextlib
import dataclasses
import io
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import common  # puts the root on the path, so it comes first
import numpy as np
import torch

import prepare_data
import train
from config import ModelConfig, PrepareConfig, TrainConfig
from internals import report
from internals.batch_size import resolve_batch_size
from internals.cli import parse, with_preset
from internals.files import write_json
from internals.machine import Machine
from internals.run_length import resolve_auto
from internals.shards import META_FORMAT, ShardWriter, read_meta
from internals.start import run
from model import GPT

ROUNDS = 9


def make_data(folder: Path, preset: str, tokens: int) -> None:
    """Make a data folder: the preset's, if it is of the embedded sample, else random tokens of gpt2's vocabulary."""
    prepared = with_preset(PrepareConfig, preset)
    if prepared.preset_source == "sample":
        return prepare_data.prepare(dataclasses.replace(prepared, data_dir=str(folder)))
    vocab_size = ModelConfig.vocab_size
    folder.mkdir()
    rng, splits = np.random.default_rng(0), {}
    for split, count in (("train", tokens), ("val", tokens // 10)):
        writer = ShardWriter(folder, split, shard_tokens=tokens)
        writer.write(rng.integers(0, vocab_size, count).astype(np.uint16))
        splits[split] = {"tokens": count, "bytes": count, "articles": 1, "shards": writer.finish()}
    meta = {
        "format": META_FORMAT,
        "tokenizer": "gpt2",
        "vocab_size": vocab_size,
        "source": {"kind": "files"},
        "splits": splits,
    }
    write_json(folder / "meta.json", meta)


def bare_loop(cfg: TrainConfig, machine: Machine) -> float:
    """Run the bare loop. Returns its seconds."""
    torch.manual_seed(cfg.seed)
    model = GPT(cfg.model).to(machine.device)
    optimizer = train.make_optimizer(model, cfg, machine.device, machine.dtype)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    forward = common.training_model(model, cfg, machine)
    steps, batch_size = cfg.accumulation_steps(processes=1), cfg.micro_batch_size(processes=1)
    window = torch.randint(cfg.model.vocab_size, (batch_size, cfg.model.block_size + 1), device=machine.device)
    inputs, targets = window[:, :-1], window[:, 1:]
    begin = time.perf_counter()
    for _ in range(cfg.max_iters):
        for _ in range(steps):
            with machine.autocast():
                loss = forward(inputs, targets)
            scaler.scale(loss / steps).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    loss.item()  # waits for the device
    return time.perf_counter() - begin


class Stopwatch:
    """Wall-clock seconds of train.py's loop from its first iteration on, evaluations excluded."""

    def __init__(self):
        self.begin, self.outside = 0.0, 0.0
        self.get_lr = train.get_lr
        train.get_lr = self.start
        outside = (
            (train, "evaluate"),
            (train, "sample_text"),
            (report, "sample_row"),
            (report, "plot"),
            (report, "run_page"),
        )
        for module, name in outside:
            setattr(module, name, self.leave_out(getattr(module, name)))

    def start(self, it: int, cfg: TrainConfig) -> float:
        if it == 0:
            self.begin, self.outside = time.perf_counter(), 0.0
        return self.get_lr(it, cfg)

    def leave_out(self, function):
        def timed(*args):
            begin = time.perf_counter()
            result = function(*args)
            self.outside += time.perf_counter() - begin
            return result

        return timed

    def seconds(self) -> float:
        return time.perf_counter() - self.begin - self.outside


def main() -> None:
    cfg = parse(TrainConfig, __doc__)
    machine = train.make_machine(cfg)
    dtype = str(machine.dtype).removeprefix("torch.")
    stopwatch = Stopwatch()
    rounds: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        tokens = max(1_000_000, 20 * cfg.model.block_size)
        make_data(Path(folder) / "data", cfg.preset, tokens)
        vocab_size = read_meta(f"{folder}/data")["vocab_size"]
        cfg = dataclasses.replace(
            cfg, data_dir=f"{folder}/data", out_dir=f"{folder}/run", dtype=dtype, overwrite=True,
            eval_interval=cfg.max_iters, model=dataclasses.replace(cfg.model, vocab_size=vocab_size),
        )  # fmt: skip
        cfg = resolve_batch_size(resolve_auto(cfg, epoch_tokens=10**9).cfg, machine)
        short = dataclasses.replace(cfg, max_iters=2)
        for count in range(-1, ROUNDS):  # round -1 warms up
            bare = bare_loop(cfg if count >= 0 else short, machine)
            with contextlib.redirect_stdout(io.StringIO()) as out:
                train.train(cfg if count >= 0 else short)
            if "Done in" not in out.getvalue():  # stopped by a signal, which train.py handles itself
                sys.exit(130)
            ours = stopwatch.seconds()
            if count >= 0:
                rounds.append((bare, ours))

    tokens = cfg.max_iters * cfg.tokens_per_iter
    print(f"{machine.name}, {dtype}, {cfg.max_iters} iterations of {cfg.tokens_per_iter:,} tokens, {ROUNDS} rounds")
    for name, seconds in (("bare loop", [r[0] for r in rounds]), ("train.py", [r[1] for r in rounds])):
        print(f"{name:10} {tokens / statistics.median(seconds):12,.0f} tokens/s")
    ratios = sorted(bare / ours for bare, ours in rounds)
    print(f"train.py is at {statistics.median(ratios):.3f} of the bare loop ({ratios[0]:.3f} to {ratios[-1]:.3f})")


if __name__ == "__main__":
    run(main)
