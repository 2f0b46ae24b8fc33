"""A race: train.py's parts in several settings, and nanoGPT, taking turns on the same text and machine.

    python benchmarks/race.py --data-dir DIR --vocab-size 4096 --nanogpt DIR \\
        --shape="--n-layer 4 --n-head 4 --n-embd 128 --n-inner 512 --block-size 128" \\
        --run="" --run="--max-iters 200" --run="--optimizer adamw"

Each `--run` is a string of train.py's flags; it follows the flags of `--shape`. nanoGPT (a checkout, not part of this project)
trains with its own model, optimizer, schedule and sampling of batches, once for each of `--nanogpt-learning-rates`. The output
is validation loss against tokens and against seconds, evaluation excluded. `--vocab-size` keeps the text's most frequent tokens
and merges all others into one, so that a CPU can race in minutes. A long race can be run in pieces: `--state FILE` keeps it
after each evaluation, and the same command continues it; `--minutes` ends a piece.

A run may have a `--data-dir` of its own, prepared from the same text with another tokenizer. Bits per byte compare them, and
`--minutes-each` gives each run as many iterations as it does in that time:

    python benchmarks/race.py --minutes-each 30 --run="--data-dir data/gpt2" --run="--data-dir data/own-8192"
"""

import dataclasses
import functools
import math
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import common  # the first: it decides which train.py is imported below
import numpy as np
import torch
import tyro

import train
from config import TrainConfig
from internals.cli import parse
from internals.files import atomic_write, write_json
from internals.run import Run, TrainState
from internals.shards import read_meta
from internals.start import UserError, run
from internals.windows import TokenStream, TrainingWindows, ValidationWindows
from model import GPT

VAL_BATCH = 64
TIMED = 3  # iterations for `--minutes-each`


@dataclass(frozen=True)
class Race:
    data_dir: str = "data/wikipedia"  # token shards, from prepare_data.py
    vocab_size: int | None = None  # tokens to keep, the last one for all rarer ones; None: all
    shape: str = ""  # flags of train.py for every run: model and length
    run: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # flags of train.py for one of our runs; repeat it for more
    minutes_each: float | None = (
        None  # of training for each run, measured in its first iterations; None: its --max-iters
    )
    seeds: tuple[int, ...] = (1337,)  # every run is done once per seed
    nanogpt: str | None = None  # folder of a checkout of nanoGPT
    nanogpt_learning_rates: tuple[float, ...] = (6e-4,)  # 6e-4 is its GPT-2 recipe's; small models may need others
    evaluations: int = 8  # per run, evenly spaced
    out: str | None = None  # file for the curves, as JSON
    state: str | None = None  # file that keeps the race after each evaluation; the same command continues from it
    minutes: float | None = None  # end after the evaluation that follows so many minutes, with --state


class Text(NamedTuple):
    """A data folder as the runs read it."""

    train: TokenStream
    val: TokenStream
    vocab_size: int
    bytes_per_token: float | None  # of validation text; None: rare tokens are merged, so the loss is not the text's

    def bits(self, val_loss: float) -> str:
        return f"{val_loss / math.log(2) / self.bytes_per_token:.4f} bits per byte" if self.bytes_per_token else ""


@functools.cache
def read_text(data_dir: str, kept: int | None) -> Text:
    """Training and validation tokens. `kept`: the vocabulary, its last token standing for all rarer ones; None: all."""
    train_stream, val_stream = (TokenStream.open(data_dir, split) for split in ("train", "val"))
    meta = read_meta(data_dir)
    if kept is None:
        split = meta["splits"]["val"]
        return Text(train_stream, val_stream, meta["vocab_size"], split["bytes"] / split["tokens"])
    counts = sum(np.bincount(shard, minlength=meta["vocab_size"]) for shard in train_stream.shards)
    new = np.full(meta["vocab_size"], kept - 1, dtype=np.uint16)
    new[np.argsort(-counts)[: kept - 1]] = np.arange(kept - 1)
    share = counts[np.argsort(-counts)[: kept - 1]].sum() / counts.sum()
    print(f"{kept:,} tokens kept: {share:.1%} of the text")
    train_stream, val_stream = (TokenStream([new[s] for s in t.shards]) for t in (train_stream, val_stream))
    return Text(train_stream, val_stream, kept, None)


class Ours:
    """train.py's loop without logging and saving."""

    def __init__(self, name: str, cfg: TrainConfig, text: Text):
        self.name, self.cfg, self.max_iters, self.text = name, cfg, cfg.max_iters, text
        machine = train.make_machine(cfg)
        windows = TrainingWindows(text.train, cfg.model.block_size, cfg.seed)
        val_windows = ValidationWindows(text.val, cfg.model.block_size, cfg.eval_tokens)
        self.training_run = Run(cfg, {}, machine, windows, val_windows)
        torch.manual_seed(cfg.seed)
        model = GPT(cfg.model).to(machine.device)
        optimizer = train.make_optimizer(model, cfg, machine.device)
        scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
        self.state = TrainState(model, optimizer, scaler)
        self.forward, _ = train.training_model(model, cfg, machine)
        self.tokens_per_iter = cfg.tokens_per_iter

    def step(self, it: int) -> None:
        cfg, state = self.cfg, self.state
        for group in state.optimizer.param_groups:
            group["lr"] = train.get_lr(it, cfg) * group["lr_scale"]
        state.tokens = it * cfg.tokens_per_iter
        losses = train.forward_backward(cfg.batch_size, self.forward, self.training_run, state)
        state.scaler.unscale_(state.optimizer)
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), cfg.grad_clip or math.inf)
        losses.tolist()  # waits, as train.py does
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        state = self.state
        return {part: getattr(state, part).state_dict() for part in ("model", "optimizer", "scaler")}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        for part, state in saved.items():
            getattr(self.state, part).load_state_dict(state)

    def evaluate(self) -> float:
        return train.evaluate(VAL_BATCH, self.state.model, self.training_run.val_windows, self.training_run.machine)


class NanoGPT:
    """nanoGPT's model and recipe as it runs: bf16 and compiled on a GPU, float32 and eager on a CPU."""

    def __init__(self, folder: str, rate: float, cfg: TrainConfig, text: Text):
        self.name, self.rate, self.cfg, self.max_iters = f"nanoGPT {rate:g}", rate, cfg, cfg.max_iters
        self.text = text
        self.tokens_per_iter = cfg.tokens_per_iter
        self.machine = train.make_machine(cfg)
        self.cuda = self.machine.device.type == "cuda"
        module = common.load_nanogpt(folder)
        c = cfg.model
        torch.manual_seed(cfg.seed)
        shape = module.GPTConfig(
            n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, block_size=c.block_size, bias=False,
            vocab_size=c.padded_vocab_size, dropout=0.0,
        )  # fmt: skip
        self.model = module.GPT(shape).to(self.machine.device)
        self.optimizer = self.model.configure_optimizers(0.1, rate, (0.9, 0.95), self.machine.device.type)
        self.forward = torch.compile(self.model) if self.cuda else self.model
        if self.cuda:
            self.forward(*(torch.zeros(cfg.batch_size, c.block_size, dtype=torch.int64, device="cuda"),) * 2)
        self.tokens = np.concatenate(text.train.shards)
        self.rng = np.random.default_rng(cfg.seed)
        self.val_windows = ValidationWindows(text.val, c.block_size, cfg.eval_tokens)

    def loss(self, array: np.ndarray) -> torch.Tensor:
        inputs, targets = self.machine.to_device(array)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=self.cuda):
            return self.forward(inputs, targets.contiguous())[1]

    def step(self, it: int) -> None:
        cfg, block = self.cfg, self.cfg.model.block_size
        schedule = dataclasses.replace(cfg, learning_rate=self.rate, min_lr=self.rate / 10)
        for group in self.optimizer.param_groups:
            group["lr"] = train.get_lr(it, schedule)
        steps = cfg.accumulation_steps(processes=1)
        for _ in range(steps):
            starts = self.rng.integers(len(self.tokens) - block - 1, size=cfg.batch_size)
            batch = np.stack([self.tokens[s : s + block + 1] for s in starts]).astype(np.int64)
            (self.loss(batch) / steps).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.cuda:
            torch.cuda.synchronize()

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        return {"model": model, "optimizer": optimizer, "rng": self.rng.bit_generator.state}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.rng.bit_generator.state = saved["rng"]

    @torch.no_grad()
    def evaluate(self) -> float:
        self.model.eval()
        total, count = 0.0, len(self.val_windows)
        for first in range(0, count, VAL_BATCH):
            last = min(first + VAL_BATCH, count)
            total += self.loss(self.val_windows.batch(first, last)).item() * (last - first)
        self.model.train()
        return total / count


Curve = list[tuple[int, float, float]]  # tokens, seconds, validation loss at every evaluation


def compete(runners: list[Any], args: Race) -> dict[str, Curve]:
    """Train all in turns, from the start or from `--state`, to the end or for `--minutes`."""
    curves: dict[str, Curve] = {runner.name: [] for runner in runners}
    if args.state and Path(args.state).exists():
        curves = load_state(args.state, runners)
    started, done = time.perf_counter(), len(next(iter(curves.values())))
    for part in range(done, args.evaluations):
        for runner in runners:
            before = curves[runner.name][-1][1] if part else 0.0
            begin = time.perf_counter()
            first, last = (runner.max_iters * n // args.evaluations for n in (part, part + 1))
            for it in range(first, last):
                runner.step(it)
            seconds = before + time.perf_counter() - begin
            row = (last * runner.tokens_per_iter, seconds, runner.evaluate())
            curves[runner.name].append(row)
            print(
                f"{runner.name:60} {row[0]:>12,} tokens {row[1]:8.1f} s   {row[2]:.4f}   {runner.text.bits(row[2])}",
                flush=True,
            )
        if args.state:
            save_state(args.state, runners, curves)
        if args.minutes is not None and time.perf_counter() - started > 60 * args.minutes:
            break
    return curves


def save_state(file: str, runners: list[Any], curves: dict[str, Curve]) -> None:
    states = {runner.name: runner.state_dict() for runner in runners}
    with atomic_write(file) as stream:
        torch.save({"curves": curves, "states": states}, stream)


def load_state(file: str, runners: list[Any]) -> dict[str, Curve]:
    """Continue the runners from where a race of the same ones was kept. Returns its curves."""
    saved = torch.load(file, map_location="cpu")
    if saved["states"].keys() != {runner.name for runner in runners}:
        raise UserError(
            f"--state {file}: keeps another race ({', '.join(saved['states'])}); delete it or name another file"
        )
    for runner in runners:
        runner.load_state_dict(saved["states"][runner.name])
    return saved["curves"]


def iterations_in(seconds: float, cfg: TrainConfig, text: Text) -> int:
    """How many iterations a run does in that time, from a few of its own."""
    runner, times = Ours("", cfg, text), []
    for it in range(1 + TIMED):
        begin = time.perf_counter()
        runner.step(it)
        times.append(time.perf_counter() - begin)
    return max(1, round(seconds / np.median(times[1:])))


def main() -> None:
    args = tyro.cli(Race, description=__doc__)

    def flags(text: str, seed: int) -> tuple[TrainConfig, Text]:
        words = ["--data-dir", args.data_dir, *shlex.split(args.shape), *shlex.split(text), "--seed", str(seed)]
        cfg = parse(TrainConfig, "", words)
        source = read_text(cfg.data_dir, args.vocab_size)
        return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=source.vocab_size)), source

    runners: list[Any] = []
    for seed in args.seeds:
        if args.nanogpt:
            for rate in args.nanogpt_learning_rates:
                runners.append(NanoGPT(args.nanogpt, rate, *flags("", seed)))
                runners[-1].name += f" seed {seed}"
        for text in args.run:
            cfg, source = flags(text, seed)
            if args.minutes_each:
                cfg = dataclasses.replace(cfg, max_iters=iterations_in(60 * args.minutes_each, cfg, source))
            runners.append(Ours(f"{text} seed {seed}", cfg, source))
    curves = compete(runners, args)

    texts = {runner.name: runner.text for runner in runners}
    evaluations = len(next(iter(curves.values())))
    print("\nAt the end:" if evaluations == args.evaluations else f"\nAfter {evaluations} of {args.evaluations} parts:")
    for name in dict.fromkeys(name.rsplit(" seed ")[0] for name in curves):
        ends = [curve[-1] for other, curve in curves.items() if other.rsplit(" seed ")[0] == name]
        losses = ", ".join(f"{end[2]:.4f}" for end in ends)
        mean, seconds = np.mean([end[2] for end in ends]), np.mean([end[1] for end in ends])
        bits = next(text.bits(mean) for other, text in texts.items() if other.rsplit(" seed ")[0] == name)
        print(f"{name or '(no flags)':50} {ends[0][0]:>12,} tokens {seconds:8.1f} s   {mean:.4f}   ({losses})   {bits}")
    if args.out:
        write_json(args.out, curves)


if __name__ == "__main__":
    run(main)
