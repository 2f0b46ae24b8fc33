"""What a run tells: the start-up text, metrics.jsonl, loss.png, the reference beside it, and the preflight's verdict."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from config import TrainConfig
from internals.files import atomic_write, write_text, writing

if TYPE_CHECKING:
    from internals.machine import Machine
    from internals.run import TrainState
    from internals.windows import TrainingWindows, ValidationWindows

# Dense 16-bit matrix rate in FLOP/s with 32-bit accumulation, from NVIDIA's data sheets, by the name PyTorch gives.
# MFU is shown for these GPUs and no other.
PEAK_FLOPS = {
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "Tesla T4": 65e12,
}

REFERENCES = Path(__file__).resolve().parents[1] / "sample"
# The settings that decide nothing of how the loss falls: where and how a run computes, what it shows and when. The seed
# decides a little, and a reference is of one seed.
NOT_LEARNING = {
    "preset", "data_dir", "out_dir", "resume", "auto_resume", "overwrite", "check", "eval_only", "device", "dtype",
    "compile", "batch_size", "log_interval", "eval_interval", "checkpoint_interval", "sample_prompt", "seed",
}  # fmt: skip


def lines(rows: dict[str, str]) -> str:
    """Rows of a name and a text, one below the other."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def size(count: float) -> str:
    """Bytes for people, in powers of 1,024 as GPU makers count memory."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def reference(cfg: TrainConfig, data_sha256: str) -> dict[str, Any] | None:
    """The run that reference/PRESET.json is of (`benchmarks/reference.py` writes it), where `cfg` is that run again: the
    same settings and the same data. Its "val_loss" gives the losses by iteration."""
    path = REFERENCES / f"{cfg.preset}.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    found["val_loss"] = {int(iter): loss for iter, loss in found["val_loss"].items()}  # JSON's keys are texts
    mine = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in NOT_LEARNING}
    return found if mine == found["settings"] and data_sha256 == found["data_sha256"] else None


# ----------------------------------------------------------------------------------------------------------------------
# Before the run


def startup(
    cfg: TrainConfig,
    meta: dict[str, Any],
    state: "TrainState",
    machine: "Machine",
    compiling: str,
    train_windows: "TrainingWindows",
    val_windows: "ValidationWindows",
    resumed_at: int | None,
    changed: list[str],
    reference: dict[str, Any] | None,
) -> str:
    """What a person should know before the run takes their evening."""
    c, count, train = cfg.model, state.model.num_parameters(), meta["splits"]["train"]
    steps = cfg.accumulation_steps(machine.processes)
    tokens = state.tokens + (cfg.max_iters - state.iter) * cfg.tokens_per_iter
    warmup = f"{cfg.warmup:,} iterations"
    if cfg.warmup < cfg.warmup_iters:
        warmup += f" (a tenth of the run; --warmup-iters is {cfg.warmup_iters:,})"
    rows = {
        "device": f"{machine.name}, {str(machine.dtype).removeprefix('torch.')} ({machine.why}), compile {compiling}",
        "model": f"{count['total']:,} parameters: {count['blocks']:,} in the blocks, {count['embedding']:,} in the "
        f"embeddings ({c.n_layer} layers, {c.n_head} heads, {c.n_embd} dimensions, context {c.block_size})",
        "data": f"{cfg.data_dir}: {train['tokens']:,} tokens of {train['articles']:,} articles to train on, "
        f"{len(val_windows) * c.block_size:,} to evaluate on; tokenizer {meta['tokenizer']}, {c.vocab_size:,} tokens",
        "iteration": f"{cfg.tokens_per_iter:,} tokens = {cfg.batch_size} sequences x {c.block_size} tokens x {steps} "
        f"micro-step{'s' if steps > 1 else ''} x {machine.processes} process{'es' if machine.processes > 1 else ''}",
        "run": f"{cfg.max_iters:,} iterations, {tokens:,} tokens, "
        f"{tokens / (train_windows.per_epoch * c.block_size):.2f} epochs; warm-up {warmup}",
        "output": cfg.out_dir,
    }
    if reference:
        rows["reference"] = (
            f"this run on {reference['hardware']}, seed {reference['seed']}, {reference['date']}: its losses beside yours"
        )
    if resumed_at is not None:
        rows["resuming"] = f"at iteration {resumed_at:,}" + (f"; changed: {', '.join(changed)}" if changed else "")
    return lines(rows)


def preflight(
    cfg: TrainConfig,
    batch_size: int,
    iteration_seconds: float,
    evaluation_seconds: float,
    total_seconds: float,
    memory: tuple[int | None, int | None],
    disk: int,
    flops_per_token: int,
    machine: "Machine",
) -> str:
    """What `--check` measured, and what the run will take by that."""
    rate = cfg.tokens_per_iter / iteration_seconds
    used, there = memory
    rows = {
        "speed": f"{rate:,.0f} tokens/s, {iteration_seconds:.2f} s an iteration, an evaluation {evaluation_seconds:.1f} s"
        + utilisation(rate, flops_per_token, machine),
        "memory": f"{size(used)} at the peak, of {size(there)}" if used and there else "not measured on this device",
        "time": f"{duration(total_seconds)} for {cfg.max_iters:,} iterations and their evaluations",
        "disk": f"{size(disk)} for checkpoints, a half of it only while one is written",
    }
    if batch_size < cfg.batch_size:
        rows["batch"] = f"--batch-size {cfg.batch_size} does not fit, {batch_size} does: training will take that"
    return lines(rows)


def utilisation(tokens_per_second: float, flops_per_token: int, machine: "Machine") -> str:
    """Model FLOPs utilisation (PaLM, Chowdhery et al., 2022): the share of the GPU's peak that training makes use of."""
    if machine.name not in PEAK_FLOPS or machine.dtype.itemsize != 2:
        return ""
    return f", MFU {tokens_per_second * flops_per_token / (PEAK_FLOPS[machine.name] * machine.processes):.0%}"


# ----------------------------------------------------------------------------------------------------------------------
# During the run


class RunLog:
    """The progress bar, config.json, metrics.jsonl and loss.png of a run.

    metrics.jsonl has a row for each log and each evaluation, on the disk before the checkpoint that follows it. It is
    cut back to the iteration where the run begins or goes on. Does nothing but in process 0.

    Raises:
        UserError: a file cannot be written.
    """

    def __init__(
        self, cfg: TrainConfig, state: "TrainState", machine: "Machine", reference: dict[str, Any] | None = None
    ):
        self.cfg, self.machine, self.out_dir = cfg, machine, Path(cfg.out_dir)
        self.reference: dict[int, float] = reference["val_loss"] if reference else {}
        self.flops_per_token = state.model.flops_per_token()
        self.last: dict[str, float | None] = {"train_loss": None, "learning_rate": None, "grad_norm": None}
        self.row_seconds, self.row_tokens = 0.0, 0  # since the last row
        if machine.is_main:
            write_text(self.out_dir / "config.json", json.dumps(dataclasses.asdict(cfg), indent=2) + "\n")
            path = self.out_dir / "metrics.jsonl"
            self.rows = [row for row in read_metrics(path) if row["iter"] <= state.iter]
            write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))
        quiet = None if machine.is_main else True  # None: where there is no terminal
        self.bar = tqdm(total=cfg.max_iters, initial=state.iter, unit="it", disable=quiet)

    def iteration(self, train_loss: float, learning_rate: float, grad_norm: float, seconds: float) -> None:
        """An iteration is done, and took so long."""
        norm = grad_norm if math.isfinite(grad_norm) else None  # float16's skipped steps; JSON knows no infinity
        self.last = {"train_loss": train_loss, "learning_rate": learning_rate, "grad_norm": norm}
        self.row_seconds += seconds
        self.row_tokens += self.cfg.tokens_per_iter
        rate = self.cfg.tokens_per_iter / seconds
        shown = f"{rate:,.0f}" + utilisation(rate, self.flops_per_token, self.machine)
        self.bar.set_postfix({"loss": f"{train_loss:.3f}", "lr": f"{learning_rate:.1e}", "tok/s": shown}, refresh=False)
        self.bar.update()

    def row(self, state: "TrainState", validation: dict[str, float] | None, best: bool) -> None:
        """Write a row, and after an evaluation draw the curves and print a line."""
        if not self.machine.is_main:
            return
        row = {
            "iter": state.iter,
            "tokens": state.tokens,
            "seconds": round(state.seconds, 3),
            **self.last,
            "tokens_per_second": round(self.row_tokens / self.row_seconds) if self.row_tokens else None,
            **(validation or {}),
        }
        self.row_seconds, self.row_tokens = 0.0, 0
        self.rows.append(row)
        path = self.out_dir / "metrics.jsonl"
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if validation:
            plot(self.rows, self.out_dir / "loss.png", self.reference)
            beside = self.reference.get(state.iter)
            tqdm.write(evaluation(state.iter, validation, self.last["train_loss"], best, beside))

    def close(self) -> None:
        self.bar.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that a killed run left half-written is no row."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def evaluation(
    iter: int,
    validation: dict[str, float],
    train_loss: float | None = None,
    best: bool = False,
    reference: float | None = None,
) -> str:
    """An evaluation in one line."""
    text = f"iteration {iter:,}: validation loss {validation['val_loss']:.4f} nats per token, perplexity "
    text += f"{validation['perplexity']:,.2f}, {validation['bits_per_byte']:.4f} bits per byte"
    if train_loss is not None:
        text += f"; training loss {train_loss:.4f}"
    if reference is not None:
        text += f"; reference {reference:.4f}"
    return text + (" (best so far)" if best else "")


def plot(rows: list[dict[str, Any]], path: Path, reference: dict[int, float]) -> None:
    """Draw the losses and the learning rate, against iterations below and tokens above."""
    from matplotlib.figure import Figure  # takes a while to import, and only this needs it

    figure = Figure(figsize=(9, 5), dpi=100, layout="constrained")
    axes = figure.add_subplot(xlabel="iteration", ylabel="loss (nats per token)")
    steps = [row for row in rows if row["train_loss"] is not None]
    if steps:
        iters = [row["iter"] for row in steps]
        axes.plot(iters, [row["train_loss"] for row in steps], color="tab:blue", alpha=0.5, label="training")
        right = axes.twinx()
        right.plot(iters, [row["learning_rate"] for row in steps], color="tab:gray", linestyle=":")
        right.set_ylabel("learning rate (dotted)")
        right.set_ylim(bottom=0)
        per_iter = steps[-1]["tokens"] / steps[-1]["iter"] / 1e6
        above = axes.secondary_xaxis("top", functions=(lambda i: i * per_iter, lambda tokens: tokens / per_iter))
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
        axes.plot(
            list(reference), list(reference.values()), color="tab:red", linestyle="--", alpha=0.5, label="reference"
        )
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
