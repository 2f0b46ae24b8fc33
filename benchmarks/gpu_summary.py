"""The Markdown page that gpu.py writes from the figures it has kept."""

import statistics
from itertools import pairwise
from typing import Any

VERSIONS = ("driver", "torch", "cuda", "python", "commit")
Parts = dict[str, dict[str, Any]]  # the contents of the parts' files


def markdown(parts: Parts, machine: dict[str, str]) -> str:
    """All figures there are, with card, driver, versions and date."""
    dates = sorted({part["date"] for part in parts.values()})
    between = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}" if dates else "nothing measured yet"
    lines = [
        f"# Figures on {machine['card']}",
        f"Driver {machine['driver']}, PyTorch {machine['torch']}, CUDA {machine['cuda']}, Python {machine['python']}, "
        f"{between}. Written by `benchmarks/gpu.py`.",
        *others(parts, machine),
    ]
    rate = parts["matrix-rate"]["figures"]["flops"] if "matrix-rate" in parts else None
    if rate:
        lines += ["## Matrix rate", f"{rate / 1e12:.1f} TFLOP/s in square bf16 products."]
    for part, ends in {"wikipedia": ("-1", "-2"), "wikipedia-256": ("",), "wikipedia-150m": ("-1", "-2")}.items():
        turns = [parts[name]["figures"] for end in ends if (name := f"speed-{part}{end}") in parts]
        if turns:
            lines += [f"## Training speed and memory: {part.removesuffix('-256')}", *speed(turns, rate)]
    optimizers = {name: parts[name]["figures"] for name in parts if name.startswith("optimizer-")}
    if optimizers:
        lines += ["## A step of the optimizer", optimizer_table(optimizers, rate)]
    runs = {name: parts[name]["figures"] for name in parts if "curve" in parts[name]["figures"]}
    if runs:
        lines += ["## Training runs", runs_table(runs), *verdict(runs)]
    for name in parts:
        if "output" in parts[name]["figures"]:
            lines += [f"## {name}", f"```text\n{parts[name]['figures']['output'].strip()}\n```"]
    return "\n\n".join(lines) + "\n"


def others(parts: Parts, machine: dict[str, str]) -> list[str]:
    """Parts that were measured with other versions than `machine` has."""
    found = []
    for name, part in parts.items():
        changed = [f"{key} {part[key]}" for key in VERSIONS if part[key] != machine[key]]
        if changed:
            found.append(f"- {name}: {', '.join(changed)}")
    return ["\n".join(found)] if found else []


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def speed(turns: list[dict[str, Any]], rate: float | None) -> list[str]:
    """Tokens/s of every turn, and the MFU and duration that follow from ours, unless ours failed."""
    names = list(dict.fromkeys(name for turn in turns for name in turn["results"]))
    results = {name: [turn["results"][name] for turn in turns if name in turn["results"]] for name in names}
    speeds = {name: statistics.mean(one["tokens_per_second"] for one in results[name]) for name in names}
    ours, first = speeds.get("ours"), turns[0]
    rows = []
    for name, measured in results.items():
        rows.append([
            name,
            " / ".join(f"{one['tokens_per_second']:,.0f}" for one in measured),
            f"{ours / speeds[name]:.2f}" if ours else "",
            f"{max(one['peak_bytes'] for one in measured) / 2**20:,.0f}",
            f"{1e3 * statistics.mean(one['micro_step'] for one in measured):,.1f}",
            f"{1e3 * statistics.mean(one['update'] for one in measured):,.1f}",
        ])  # fmt: skip
    head = ["", "tokens/s, each turn", "ours is, times", "peak MiB", "micro-step ms", "update ms"]
    follows = [f"{first['batch_size']} sequences in a micro-step."]
    for words in ("out_of_memory", "missing"):
        if absent := list(dict.fromkeys(name for turn in turns for name in turn.get(words, ()))):
            follows.append(f"{words.replace('_', ' ').capitalize()}: {', '.join(absent)}.")
    if ours and rate:
        follows.append(f"MFU {ours * first['flops_per_token'] / rate:.1%} of the measured matrix rate.")
    if ours:
        minutes = first["run_tokens"] / ours / 60
        follows.append(f"The preset's whole run would take {minutes:,.0f} minutes, without evaluations.")
    return [table(head, rows), " ".join(follows)]


def optimizer_table(optimizers: dict[str, dict[str, Any]], rate: float | None) -> str:
    rows = []
    for part, figures in optimizers.items():
        for name, one in figures.items():
            share = f"{one['flops'] / one['seconds'] / rate:.1%}" if rate and one["flops"] else ""
            row = [f"{part.removeprefix('optimizer-')}, {name}", f"{1e3 * one['seconds']:.2f}"]
            rows.append([*row, str(one.get("launches", "")), f"{one['flops'] / 1e9:,.1f}", share])
    return table(["", "ms", "launches", "GFLOP in products", "of the matrix rate"], rows)


def rate_of(curve: list[list[float]]) -> float:
    """Tokens/s, the median over the stretches between evaluations: some stretches contain the compiling of a piece."""
    points = [(0, 0.0), *((tokens, seconds) for tokens, seconds, _ in curve if tokens)]
    return statistics.median((b[0] - a[0]) / (b[1] - a[1]) for a, b in pairwise(points))


def runs_table(runs: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, figures in runs.items():
        (tokens, _, loss), speed = figures["curve"][-1], rate_of(figures["curve"])
        minutes = f"{tokens / speed / 60:.1f}"
        rows.append(
            [name, f"{tokens / 1e6:,.1f}", f"{speed:,.0f}", minutes, f"{loss:.4f}", f"{figures['bits_per_byte']:.4f}"]
        )
    head = ["", "million tokens", "tokens/s", "minutes at that rate", "validation loss", "bits per byte"]
    return table(head, rows)


def verdict(runs: dict[str, dict[str, Any]]) -> list[str]:
    """Which of our runs end at or below nanoGPT's best loss, and in what share of its time."""
    cost = {name: (f["curve"][-1][2], f["curve"][-1][0] / rate_of(f["curve"])) for name, f in runs.items()}
    theirs = [cost[name] for name in runs if name.startswith("race-nanogpt")]
    if not theirs:
        return []
    loss, seconds = min(theirs)
    below = [
        f"{name} in {taken / seconds:.2f} of the time"
        for name, (end, taken) in cost.items()
        if name.startswith("race-ours") and end <= loss
    ]
    return [f"At or below nanoGPT's best loss, {loss:.4f}: {', '.join(below) or 'none of our runs'}."]
