"""A race: train.py's parts in several settings, and nanoGPT, taking turns on the same text and machine.

    python benchmarks/race.py --data-dir DIR --vocab-size 4096 --nanogpt DIR \\
        --shape="--n-layer 4 --n-head 4 --n-embd 128 --n-inner 512 --block-size 128" \\
        --run="" --run="--max-iters 200" --run="--optimizer adamw --learning-rate 2e-3" --nanogpt-run="--learning-rate 6e-4"

Each `--run` and `--nanogpt-run` is a string of train.py's flags; it follows the flags of `--shape`. nanoGPT (a
checkout, not part of this project) trains with its own model, optimizer and sampling of batches. The output is
validation loss against tokens and against seconds, evaluation excluded. `--vocab-size` keeps the text's most frequent
tokens and merges all others into one, so that a CPU can race in minutes. A long race can be run in pieces: `--state
FILE` keeps it after each evaluation, and the same command continues it; `--minutes` ends a piece.

A run may have a `--data-dir` of its own, prepared from the same text with another tokenizer. Bits per byte compare
them, and `--minutes-each` gives each run as many iterations as it does in that time:

    python benchmarks/race.py --minutes-each 30 --run="--data-dir data/gpt2" --run="--data-dir data/own-8192" --picture race.png
"""

import dataclasses
import functools
import math
import shlex
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import common  # puts the root on the path, so it comes first
import numpy as np
import torch
import tyro

import train
from config import TrainConfig
from internals.batch_size import resolve_batch_size
from internals.cli import parse
from internals.files import atomic_write, write_json
from internals.run import Run, TrainState
from internals.run_length import resolve_auto
from internals.shards import read_meta
from internals.start import UserError, run
from internals.windows import TokenStream, TrainingWindows, ValidationWindows
from model import GPT

VAL_BATCH = 16
TIMED_SECONDS = 10  # of iterations, for `--minutes-each`


@dataclass(frozen=True)
class Race:
    data_dir: str = "data/wikipedia"  # token shards, from prepare_data.py
    vocab_size: int | None = None  # tokens to keep, the last one for all rarer ones; None: all
    shape: str = ""  # flags of train.py for every run: model and length
    run: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # flags of train.py for one of our runs; repeat it for more
    nanogpt: str | None = None  # folder of a checkout of nanoGPT
    nanogpt_run: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # the same for one of its runs
    minutes_each: float | None = None  # minutes of training per run, by its own speed; None: --max-iters
    seeds: tuple[int, ...] = (1337,)  # every run is done once per seed
    evaluations: int = 8  # per run, evenly spaced
    out: str | None = None  # file for the curves, as JSON
    picture: str | None = None  # file for a picture of them (.png): bits per byte against minutes
    state: str | None = None  # file that keeps the race after each evaluation; the same command continues from it
    minutes: float | None = None  # stop at the first evaluation after this many minutes, with --state


class Text(NamedTuple):
    """A data folder as the runs read it."""

    train: TokenStream
    val: TokenStream
    vocab_size: int
    bytes_per_token: float | None  # of validation text; None: rare tokens are merged, so the loss is not the text's

    def bits(self, val_loss: float) -> float:
        """Bits per byte of a loss in nats per token; NaN where tokens are merged."""
        return val_loss / math.log(2) / (self.bytes_per_token or math.nan)


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
        machine = train.make_machine(cfg)
        windows = TrainingWindows(text.train, cfg.model.block_size, cfg.seed)
        cfg = resolve_batch_size(resolve_auto(cfg, windows.epoch_tokens).cfg, machine)
        self.name, self.cfg, self.max_iters, self.text = name, cfg, cfg.max_iters, text
        val_windows = ValidationWindows(text.val, cfg.model.block_size, cfg.eval_tokens)
        self.training_run = Run(cfg, {}, machine, windows, val_windows)
        torch.manual_seed(cfg.seed)
        model = GPT(cfg.model).to(machine.device)
        optimizer = train.make_optimizer(model, cfg, machine.device, machine.dtype)
        scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
        self.state = TrainState(model, optimizer, scaler)
        self.forward = common.training_model(model, cfg, machine)
        self.tokens_per_iter = cfg.tokens_per_iter

    def step(self, it: int) -> None:
        cfg, state = self.cfg, self.state
        for group in state.optimizer.param_groups:
            group["lr"] = train.get_lr(it, cfg) * group["lr_scale"]
        state.tokens = it * cfg.tokens_per_iter
        losses = train.forward_backward(self.training_run.batch_size, self.forward, self.training_run, state)
        state.scaler.unscale_(state.optimizer)
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), cfg.grad_clip or math.inf)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()
        losses.tolist()  # waits, as train.py does

    def state_dict(self) -> dict[str, Any]:
        state = self.state
        return {part: getattr(state, part).state_dict() for part in ("model", "optimizer", "scaler")}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        for part, state in saved.items():
            getattr(self.state, part).load_state_dict(state)

    def evaluate(self) -> float:
        return train.evaluate(VAL_BATCH, self.state.model, self.training_run.val_windows, self.training_run.machine)


class NanoGPT:
    """nanoGPT's model and recipe as it runs: bf16 and compiled on a GPU, float32 and eager on a CPU.

    As its train.py does, it reads a batch while the card works on the one before, and waits for the card every tenth
    iteration (log_interval in its config/train_gpt2.py).
    """

    def __init__(self, folder: str, name: str, cfg: TrainConfig, text: Text):
        self.tokens, self.machine = np.concatenate(text.train.shards), train.make_machine(cfg)
        cfg = resolve_batch_size(resolve_auto(cfg, len(self.tokens)).cfg, self.machine)
        self.name, self.cfg, self.max_iters, self.text = name, cfg, cfg.max_iters, text
        self.tokens_per_iter, self.batch_size = cfg.tokens_per_iter, cfg.micro_batch_size(processes=1)
        self.cuda = self.machine.device.type == "cuda"
        c = cfg.model
        torch.manual_seed(cfg.seed)
        self.model = common.nanogpt_model(folder, c).to(self.machine.device)
        self.optimizer = self.model.configure_optimizers(
            cfg.weight_decay, cfg.learning_rate, (cfg.beta1, cfg.beta2), self.machine.device.type
        )  # fmt: skip
        self.forward = torch.compile(self.model) if self.cuda else self.model
        if self.cuda:  # compile before the race: for the same precision and the same layout, with the backward pass
            self.loss(self.forward, np.zeros((self.batch_size, c.block_size + 1), np.int64)).backward()
            self.model.zero_grad()
        self.rng = np.random.default_rng(cfg.seed)
        self.batch = self.next_batch()
        self.val_windows = ValidationWindows(text.val, c.block_size, cfg.eval_tokens)

    def next_batch(self) -> np.ndarray:
        self.rng_before = self.rng.bit_generator.state
        block = self.cfg.model.block_size
        starts = self.rng.integers(len(self.tokens) - block - 1, size=self.batch_size)
        return np.stack([self.tokens[s : s + block + 1] for s in starts]).astype(np.int64)

    def loss(self, forward: Callable, array: np.ndarray) -> torch.Tensor:
        inputs, targets = self.machine.to_device(array)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=self.cuda):
            return forward(inputs, targets.contiguous())[1]

    def step(self, it: int) -> None:
        cfg = self.cfg
        for group in self.optimizer.param_groups:
            group["lr"] = train.get_lr(it, cfg)
        steps = cfg.accumulation_steps(processes=1)
        for _ in range(steps):
            loss = self.loss(self.forward, self.batch) / steps
            self.batch = self.next_batch()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if it % 10 == 0:
            loss.item()

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        return {"model": model, "optimizer": optimizer, "rng": self.rng_before}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.rng.bit_generator.state = saved["rng"]
        self.batch = self.next_batch()

    @torch.no_grad()
    def evaluate(self) -> float:
        self.model.eval()
        total, count = 0.0, len(self.val_windows)
        for first in range(0, count, VAL_BATCH):
            last = min(first + VAL_BATCH, count)
            # Not compiled: batches of other sizes would be compiled again
            total += self.loss(self.model, self.val_windows.batch(first, last)).item() * (last - first)
        self.model.train()
        return total / count


class Point(NamedTuple):
    """An evaluation."""

    tokens: int
    seconds: float  # of training
    val_loss: float  # nats per token


Curves = dict[str, list[Point]]  # by the runner's name


def compete(runners: list[Any], args: Race) -> Curves:
    """Train all in turns, from the start or from `--state`, to the end or for `--minutes`."""
    curves: Curves = {runner.name: [] for runner in runners}
    if args.state and Path(args.state).exists():
        curves = load_state(args.state, runners, args.evaluations)
    started, done = time.perf_counter(), len(next(iter(curves.values())))
    for part in range(done, args.evaluations):
        for runner in runners:
            before = curves[runner.name][-1].seconds if part else 0.0
            begin = time.perf_counter()
            first, last = (runner.max_iters * n // args.evaluations for n in (part, part + 1))
            for it in range(first, last):
                runner.step(it)
            wait_for_the_card()
            seconds = before + time.perf_counter() - begin
            point = Point(last * runner.tokens_per_iter, seconds, runner.evaluate())
            curves[runner.name].append(point)
            print(f"{runner.name:60} {describe(point, runner.text)}", flush=True)
        if args.state:
            save_state(args.state, runners, curves, args.evaluations)
        if args.minutes is not None and time.perf_counter() - started > 60 * args.minutes:
            break
    return curves


def wait_for_the_card() -> None:
    """Until it has computed all that it was given, if a runner is on a card."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def describe(point: Point, text: Text) -> str:
    bits = f"{text.bits(point.val_loss):.4f} bits per byte" if text.bytes_per_token else ""
    return f"{point.tokens:>12,} tokens {point.seconds:8.1f} s   {point.val_loss:.4f}   {bits}"


def save_state(file: str, runners: list[Any], curves: Curves, evaluations: int) -> None:
    states = {runner.name: runner.state_dict() for runner in runners}
    with atomic_write(file) as stream:
        lengths = {runner.name: runner.max_iters for runner in runners}
        plain = {name: [tuple(point) for point in curve] for name, curve in curves.items()}
        torch.save({"curves": plain, "states": states, "lengths": lengths, "evaluations": evaluations}, stream)


def load_state(file: str, runners: list[Any], evaluations: int) -> Curves:
    """Continue the runners from where a race of the same ones was kept. Returns its curves."""
    saved = torch.load(file, map_location="cpu")
    if saved["states"].keys() != {runner.name for runner in runners}:
        raise UserError(
            f"--state {file}: keeps another race ({', '.join(saved['states'])}); delete it or name another file"
        )
    lengths = {runner.name: runner.max_iters for runner in runners}
    if saved["lengths"] != lengths or saved["evaluations"] != evaluations:
        raise UserError(
            f"--state {file}: keeps this race with another length or --evaluations; delete it, or give the same"
        )
    for runner in runners:
        runner.load_state_dict(saved["states"][runner.name])
    return {name: [Point(*point) for point in curve] for name, curve in saved["curves"].items()}


def iterations_in(seconds: float, runner: Any) -> int:
    """How many iterations a run does in that time, by the median of some of its own."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < TIMED_SECONDS:
        begin = time.perf_counter()
        runner.step(len(times))
        wait_for_the_card()
        times.append(time.perf_counter() - begin)
    return max(1, round(seconds / np.median(times[1:])))


def entries(args: Race) -> Iterator[tuple[str, Callable[[str, TrainConfig, Text], Any], str]]:
    """Name, maker and flags of each run."""
    for text in args.nanogpt_run:
        yield f"nanoGPT {text}".strip(), functools.partial(NanoGPT, args.nanogpt), text
    for text in args.run:
        yield text, Ours, text


def make_runners(args: Race) -> list[Any]:
    runners = []
    # PyTorch compiles a function for so many shapes, and then silently no more
    torch._dynamo.config.recompile_limit = max(
        torch._dynamo.config.recompile_limit, 2 * len(args.run + args.nanogpt_run)
    )
    continued = args.state and Path(args.state).exists()
    lengths = torch.load(args.state, map_location="cpu")["lengths"] if continued else {}
    for seed in args.seeds:
        for name, make, text in entries(args):
            full_name = f"{name} seed {seed}"
            words = ["--data-dir", args.data_dir, *shlex.split(args.shape), *shlex.split(text), "--seed", str(seed)]
            cfg = parse(TrainConfig, "", words)
            source = read_text(cfg.data_dir, args.vocab_size)
            cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=source.vocab_size))
            if args.minutes_each:
                iters = lengths.get(full_name) or iterations_in(60 * args.minutes_each, make(full_name, cfg, source))
                cfg = dataclasses.replace(cfg, max_iters=iters)
            runners.append(make(full_name, cfg, source))
    return runners


# ----------------------------------------------------------------------------------------------------------------------
# The result


def print_ends(curves: Curves, texts: dict[str, Text], evaluations: int) -> None:
    done = len(next(iter(curves.values())))
    print("\nAt the end:" if done == evaluations else f"\nAfter {done} of {evaluations} parts:")
    for name in dict.fromkeys(name.rsplit(" seed ")[0] for name in curves):
        same = {other: curve[-1] for other, curve in curves.items() if other.rsplit(" seed ")[0] == name}
        tokens, seconds, val_loss = (np.mean(values) for values in zip(*same.values(), strict=True))
        mean = Point(round(tokens), seconds, val_loss)
        losses = ", ".join(f"{end.val_loss:.4f}" for end in same.values())
        print(f"{name or '(no flags)':50} {describe(mean, texts[next(iter(same))])}   ({losses})")
    if done == evaluations and all(text.bytes_per_token for text in texts.values()):
        print_overtaking(curves, texts)


def print_overtaking(curves: Curves, texts: dict[str, Text]) -> None:
    """When our runs were first seen at or below the end of nanoGPT's best."""
    bits = {name: [texts[name].bits(point.val_loss) for point in curve] for name, curve in curves.items()}
    theirs = {name: values[-1] for name, values in bits.items() if name.startswith("nanoGPT")}
    if not theirs:
        return
    best = min(theirs, key=theirs.get)
    for name in curves.keys() - theirs.keys():
        reached = [p.seconds for p, b in zip(curves[name], bits[name], strict=True) if b <= theirs[best]]
        when = f"in {reached[0]:.0f} s, {reached[0] / curves[best][-1].seconds:.3f} of its time" if reached else "never"
        print(
            f"{name}: reached the end of {best} ({theirs[best]:.4f}) {when}; {bits[name][-1] - theirs[best]:+.4f} at its end"
        )


def draw(curves: Curves, texts: dict[str, Text], path: str) -> None:
    from matplotlib.figure import Figure  # takes long to import

    figure = Figure(figsize=(8, 4.5), dpi=100, layout="constrained")
    axes = figure.add_subplot(xlabel="minutes of training", ylabel="bits per byte of held-out text")
    for name, curve in curves.items():
        bits = [texts[name].bits(point.val_loss) for point in curve]
        axes.plot([point.seconds / 60 for point in curve], bits, marker=".", label=textwrap.fill(name, 60))
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def main() -> None:
    args = tyro.cli(Race, description=__doc__)
    if bool(args.nanogpt) != bool(args.nanogpt_run):
        raise UserError("--nanogpt and --nanogpt-run: give both or neither")
    if not (args.run or args.nanogpt_run):
        raise UserError('--run: give one at least; --run="" is the shape with its own settings')
    runners = make_runners(args)
    curves = compete(runners, args)
    texts = {runner.name: runner.text for runner in runners}
    print_ends(curves, texts, args.evaluations)
    if args.out:
        write_json(args.out, curves)
    if args.picture:
        draw(curves, texts, args.picture)


if __name__ == "__main__":
    run(main)
