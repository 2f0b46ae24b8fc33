"""A run's output: start-up summary, evaluations, metrics.jsonl, samples.jsonl, loss.png, run.html, closing message."""

import json
import math
import os
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from tqdm import tqdm

from config import NOT_SETTINGS, TrainConfig
from internals.cli import with_preset
from internals.device import PEAK_FLOPS
from internals.files import atomic_write, write_text
from internals.machine import Machine
from internals.reference import Reference, bits_per_nat, find_reference
from internals.run import Run, TrainState
from internals.run_folder import Rows, delete_run
from internals.run_page import run_page
from internals.samples import sample_row
from internals.screen import (
    TrainingBar,
    command,
    command_to_generate,
    duration,
    evaluation_line,
    launcher,
    lines,
    plural,
    printable,
    wrap,
)
from internals.start import UserError, first_line
from internals.tokenizer import load_tokenizer, tokenizer_name
from internals.trackers import Tracker

NEXT_PAGE = 3600.0  # seconds until the page of a running run is overdue, at the least


def validation_row(val_loss: float, meta: dict[str, Any]) -> dict[str, float]:
    """The loss in three units."""
    return {
        "val_loss": val_loss,
        "perplexity": math.exp(min(val_loss, 700)),  # more overflows a float, and a run that diverged has more
        "bits_per_byte": val_loss * bits_per_nat(meta),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Before the run


def summary(run: Run, state: TrainState) -> dict[str, str]:
    """Device, model, data, iteration and run in words."""
    cfg, machine = run.cfg, run.machine
    model, count, train = cfg.model, state.model.num_parameters(), run.meta["splits"]["train"]
    steps = cfg.accumulation_steps(machine.processes)
    smaller = ""
    if run.batch_size < cfg.batch_size:
        share = f"{plural(cfg.sequences_per_process(machine.processes), 'sequence')} a process"
        smaller = f" (batch_size {cfg.batch_size} -> {run.batch_size}: it must divide the {share})"
    tokens = state.tokens + (cfg.max_iters - state.iter) * cfg.tokens_per_iter
    warmup = plural(cfg.warmup, "iteration")
    if cfg.warmup < cfg.warmup_iters:
        warmup += f" (a tenth of the run; --warmup-iters is {cfg.warmup_iters:,})"
    return {
        "device": f"{machine.name}, {machine.describe()['dtype']} ({machine.dtype_reason})",
        "model": f"{count['total']:,} parameters: {count['blocks']:,} in the blocks, {count['embedding']:,} in the "
        f"embeddings ({plural(model.n_layer, 'layer')}, {plural(model.n_head, 'head')}, {model.n_embd} dimensions, "
        f"context {model.block_size})",
        "data": f"{cfg.data_dir}: {train['tokens']:,} tokens of {plural(train['articles'], 'article')} to train on, "
        f"{run.val_windows.tokens:,} to evaluate on; tokenizer {tokenizer_name(run.tokenizer)}, "
        f"{model.vocab_size:,} tokens",
        "iteration": f"{cfg.tokens_per_iter:,} tokens = {plural(run.batch_size, 'sequence')} x {model.block_size} tokens x "
        f"{plural(steps, 'micro-step')} x {plural(machine.processes, 'process', 'es')}{smaller}",
        "run": f"{plural(cfg.max_iters, 'iteration')}, {tokens:,} tokens, "
        f"{tokens / run.train_windows.epoch_tokens:.2f} epochs; warm-up {warmup}",
        **({"chosen": "; ".join(run.chosen)} if run.chosen else {}),
    }


def startup(run: Run, state: TrainState, compiling: str) -> str:
    """The start-up summary."""
    cfg, rows = run.cfg, summary(run, state)
    rows = {"device": rows["device"], "compile": compiling, **rows, "output": cfg.out_dir}
    if reference := find_reference(cfg, run.meta):
        rows["reference"] = reference.summary
    if run.resumed_at is not None:
        changes = f"; changed: {', '.join(run.changes)}" if run.changes else ""
        rows["resuming"] = f"at iteration {run.resumed_at:,}{changes}"
    return lines(rows)


def page_facts(run: Run, state: TrainState) -> dict[str, str]:
    """The head of run.html: the summary, and the settings that differ from the preset's, what `auto` chose among them."""
    usual = with_preset(TrainConfig, run.cfg.preset)
    preset, now = ({**settings, **settings["model"]} for settings in (usual.settings(), run.cfg.settings()))
    unnamed = {*NOT_SETTINGS, "model", "vocab_size"}
    settings = [f"{name} {new}" for name, new in now.items() if name not in unnamed and new != preset[name]]
    return {
        **summary(run, state),
        "settings": f"preset {run.cfg.preset}, with " + (", ".join(settings) or "nothing changed"),
    }


def ending(run: Run, state: TrainState) -> str:
    """The closing message of a run: whether it is finished, the files that it wrote, and the next command."""
    cfg = run.cfg
    if state.iter < cfg.max_iters:
        return f"Stopped at iteration {state.iter:,}, all saved.\n{continuing(cfg, 'Continue')}"
    best = state.best_val_loss
    drawn = {"Curves": run.out_dir / "loss.png", "Page": run.out_dir / "run.html"}  # a run continues without them
    shown = "".join(f"{name}: {path}\n" for name, path in drawn.items() if path.exists())
    bits = f"{best * bits_per_nat(run.meta):.2f} bits/byte"
    return (
        f"Done in {duration(state.seconds)} of training. Best validation loss {best:.3f} ({bits}).\n"
        f"Model: {run.out_dir / 'best.pt'}\n{shown}"
        f"Try: {command_to_generate(run.out_dir / 'best.pt', cfg)}"
    )


def already_finished(run: Run) -> str:
    words = f"The run in {run.cfg.out_dir} is finished ({plural(run.resumed_at, 'iteration')})."
    return f"{wrap(words)}\n{continuing(run.cfg, 'Extend it', max_iters=2 * run.resumed_at)}"


def continuing(cfg: TrainConfig, verb: str, **changes: Any) -> str:
    """The command that resumes a run. It needs only the folder: last.pt has the settings and the path of the data."""
    others = " (on each machine with its own --node-rank)" if "--node-rank" in launcher() else ""
    return f"{verb}{others}: {command('train.py', cfg.preset, out_dir=cfg.out_dir, resume=True, **changes)}"


def page_status(cfg: TrainConfig, state: TrainState, running: bool) -> str:
    """How far a run is."""
    text = f"iteration {state.iter:,} of {cfg.max_iters:,} · {duration(state.seconds)} of training"
    if running and 0 < state.iter < cfg.max_iters:
        left = state.seconds / state.iter * (cfg.max_iters - state.iter)
        text += f", about {duration(left)} left, not counting evaluations"
    return f"{text} · {datetime.now():%Y-%m-%d %H:%M}"


def utilisation(tokens_per_second: float, flops_per_token: int, machine: Machine) -> str:
    """Model FLOPs utilisation (PaLM, Chowdhery et al., 2022): the share of the GPU's peak rate that training uses."""
    if machine.name not in PEAK_FLOPS or machine.dtype.itemsize != 2:
        return ""
    return f"MFU {tokens_per_second * flops_per_token / (PEAK_FLOPS[machine.name] * machine.processes):.0%}"


# ----------------------------------------------------------------------------------------------------------------------
# During the run


class RunLog:
    """The progress bar, config.json, metrics.jsonl, samples.jsonl, loss.png, run.html and tracker of a run. Only
    process 0 does anything here.

    metrics.jsonl has a row for each log and each evaluation, samples.jsonl one for each evaluation. After `begin`, no
    failure here costs the run an iteration: rows that cannot be written wait in memory until the next `flush`, and each
    kind of failure is reported once.
    """

    def __init__(self, run: Run, state: TrainState):
        self.run, self.cfg, self.machine, self.state = run, run.cfg, run.machine, state
        self.reference = find_reference(run.cfg, run.meta)
        self.flops_per_token = state.model.flops_per_token()
        self.last: dict[str, float | None] = {"train_loss": None, "learning_rate": None, "grad_norm": None}
        self.row_seconds, self.row_tokens = 0.0, 0  # since the last row
        self.failures: set[str] = set()  # kinds that were reported
        self.sample = ""  # the text of the last evaluation
        self.facts, self.page_time = page_facts(run, state), time.time()  # of the page, and when it was last written
        if self.machine.is_main:
            self.metrics = Rows(run.out_dir / "metrics.jsonl", run.resumed_at, repair=True)
            self.samples = Rows(run.out_dir / "samples.jsonl", run.resumed_at, repair=True)
            self.tracker = Tracker(run.cfg.tracker)
        if run.resumed_at is not None:
            self.begin()
        self.bar = TrainingBar(run.cfg, state.iter, self.machine.is_main)

    def begin(self) -> None:
        """Begin to write. For a new run this deletes an earlier run's files, so it comes after the first evaluation."""
        run = self.run
        if not self.machine.is_main:
            return
        if run.resumed_at is None:
            delete_run(run.out_dir)
        # ASCII, which write_json does not write: the prompt may hold half a character
        write_text(run.out_dir / "config.json", json.dumps(run.cfg.settings(), indent=2) + "\n")
        for file in (self.metrics, self.samples):
            self._attempt(file.path.name, file.cut)
        self.tracker.open(run, self.metrics.rows)
        if run.resumed_at is not None:  # the run may have been killed before it wrote the page
            self._write_page(running=True)

    def iteration(self, train_loss: float, learning_rate: float, grad_norm: float, seconds: float) -> None:
        """Record an iteration, and move the progress bar."""
        norm = grad_norm if math.isfinite(grad_norm) else None  # float16's skipped steps; JSON has no infinity
        self.last = {"train_loss": train_loss, "learning_rate": learning_rate, "grad_norm": norm}
        self.row_seconds += seconds
        self.row_tokens += self.cfg.tokens_per_iter
        rate = self.cfg.tokens_per_iter / seconds
        self.bar.iteration(train_loss, rate, utilisation(rate, self.flops_per_token, self.machine), seconds)

    def write_row(self, evaluated: bool) -> None:
        """Add a row to metrics.jsonl; with the validation loss if this iteration was evaluated."""
        if not self.machine.is_main:
            return
        state = self.state
        row = {
            "iter": state.iter,
            "tokens": state.tokens,
            "seconds": round(state.seconds, 3),
            **self.last,
            "tokens_per_second": round(self.row_tokens / self.row_seconds) if self.row_tokens else None,
            **(validation_row(state.val_loss, self.run.meta) if evaluated else {}),
        }
        self.row_seconds, self.row_tokens = 0.0, 0
        self.metrics.add(row)
        self.tracker.log(row)
        self.flush()

    def write_sample(self, tokenizer: tiktoken.Encoding, sample: str) -> None:
        """Add a row to samples.jsonl: a text that the model wrote, and its surprise at the passage."""
        self.sample = sample
        self._attempt(
            "surprise",
            lambda: self.samples.add(sample_row(self.run, self.state, tokenizer, sample)),
            failure="no surprise at the passage, and no row for it in samples.jsonl",
        )

    def flush(self) -> None:
        """Write the waiting rows."""
        if self.machine.is_main:
            for file in (self.metrics, self.samples):
                self._attempt(file.path.name, file.flush)
            self.tracker.flush()

    def tell_evaluation(self, best: bool) -> None:
        """Print the evaluation of the last row and its sample, draw the curves and write the page."""
        if not self.machine.is_main:
            return
        row = self.metrics.rows[-1]
        reference = self.reference.beside(row["iter"]) if self.reference else ""
        tqdm.write(evaluation_line(row, self.cfg.max_iters, best, reference))
        if self.sample:
            sample = printable(self.sample).strip()  # an untrained model writes any byte
            tqdm.write("\n".join(wrap(line, "    ", "    ") for line in sample.split("\n")))
        self._attempt("loss.png", lambda: plot(self.metrics.rows, self.run.out_dir / "loss.png", self.reference))
        self._write_page(running=True)
        self.bar.evaluated()

    def close(self) -> None:
        self.flush()
        if self.machine.is_main:
            self._write_page(running=False)
            self.tracker.close()
        self.bar.close()

    def _write_page(self, running: bool) -> None:
        def write() -> None:
            last, self.page_time = self.page_time, time.time()
            due = self.page_time + max(NEXT_PAGE, 3 * (self.page_time - last)) if running else None
            status = page_status(self.cfg, self.state, running)
            rows = self.metrics.rows, self.samples.rows
            page = run_page(self.run, self.facts, status, *rows, self.reference, due)
            write_text(self.run.out_dir / "run.html", page)

        if self.metrics.rows:
            self._attempt("run.html", write)

    def _attempt(self, name: str, action: Callable[[], None], failure: str = "") -> None:
        """Run an action whose failure must not harm the run. The first failure of each name is reported, in the words
        `failure` or as that of the file `name`."""
        try:
            action()
        except Exception as error:  # a disk, a font, a backend: no such failure is worth an iteration
            if name not in self.failures:
                self.failures.add(name)
                says_all = isinstance(error, UserError) and not failure  # the file's name, too
                failure = failure or f"{self.run.out_dir / name} could not be written"
                text = str(error) if says_all else f"{failure} ({first_line(error)})"
                tqdm.write(printable(f"{text}; training continues"))


def window_text(run: Run, window_id: int) -> str:
    """The text of a training window, as a sentence of a message; empty if there is no tokenizer."""
    try:
        tokenizer = load_tokenizer(run.tokenizer)
    except UserError:
        return ""
    text = tokenizer.decode(run.train_windows.batch([window_id])[0].tolist(), errors="replace")
    return f'The first reads: "{printable(text).replace(chr(10), " ")[:400]}". '


def plot(rows: list[dict[str, Any]], path: Path, reference: Reference | None) -> None:
    """Draw the losses and the learning rate over iterations (lower axis) and tokens (upper axis)."""
    # Jupyter and Colab set a backend here that matplotlib may not find; a Figure needs none
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.figure import Figure  # takes long to import
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend

    figure = Figure(figsize=(9, 5), dpi=100, layout="constrained")
    axes = figure.add_subplot(xlabel="iteration", ylabel="loss (nats per token)")
    steps = [row for row in rows if row.get("train_loss") is not None]
    if steps:
        iters = [row["iter"] for row in steps]
        axes.plot(iters, [row["train_loss"] for row in steps], color="tab:blue", alpha=0.5, label="training")
        right = axes.twinx()
        right.plot(iters, [row["learning_rate"] for row in steps], color="tab:gray", linestyle=":")
        right.set_ylabel("learning rate (dotted)")
        right.set_ylim(bottom=0)
        tokens = [row["tokens"] / 1e6 for row in steps]
        # A resumed run may have other tokens per iteration. The ends lie beyond the margins of the axis.
        below, over = [-iters[-1], 0, *iters, 2 * iters[-1]], [-tokens[-1], 0, *tokens, 2 * tokens[-1]]
        above = axes.secondary_xaxis(
            "top", functions=(lambda i: np.interp(i, below, over), lambda t: np.interp(t, over, below))
        )
        above.set_xlabel("million tokens")
    evaluations = [row for row in rows if "val_loss" in row]
    axes.plot(
        [row["iter"] for row in evaluations],
        [row["val_loss"] for row in evaluations],
        color="tab:red",
        marker=".",
        label="validation",
    )
    if reference:
        label = reference.label if reference.same_text else f"{reference.label} (at equal bits per byte)"
        x, y = list(reference.losses), list(reference.losses.values())
        axes.plot(x, y, color="tab:red", linestyle="--", alpha=0.5, label=label)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
