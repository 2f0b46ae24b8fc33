"""Draw a run for the README: what the model wrote at four evaluations, above the curve of its validation loss.

    python train.py --preset demo
    python benchmarks/strip.py checkpoints/demo --at 0 100 300 600 --picture docs/demo.png

Everything in the picture is in the run's metrics.jsonl and samples.jsonl. A sample is cut to the length that fits,
nothing else is changed; control characters are shown as the replacement character.
"""

import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common  # noqa: F401  (puts the root on the path, so it comes first)
import tyro
from matplotlib.figure import Figure

from internals.files import atomic_write
from internals.run_folder import Rows
from internals.screen import printable
from internals.start import UserError, run

COLUMNS, LINES = 27, 12  # of sample text


@dataclass(frozen=True)
class Strip:
    out_dir: tyro.conf.Positional[str]  # of the run
    at: tuple[int, int, int, int]  # the iterations of four evaluations
    picture: str  # file to write (.png)
    title: str = ""  # of the picture


def excerpt(sample: str) -> str:
    """The beginning of a sample, on a few lines."""
    text = " ".join(printable(sample).split())
    return textwrap.fill(text, COLUMNS, max_lines=LINES, placeholder=" ...", break_on_hyphens=False)


def rows(path: Path) -> list[dict[str, Any]]:
    return Rows(path, until=sys.maxsize).rows


def draw(args: Strip, evaluations: list[dict[str, Any]], samples: dict[int, str]) -> Figure:
    figure = Figure(figsize=(10, 4.6), dpi=100, layout="constrained")
    texts, curve = figure.subfigures(2, 1, height_ratios=(1.05, 1))
    if args.title:
        figure.suptitle(args.title, fontsize=11)
    for axes, iter in zip(texts.subplots(1, 4), args.at, strict=True):
        axes.set_axis_off()
        axes.set_title(f"iteration {iter:,}", fontsize=10, loc="left")
        axes.text(0, 1, excerpt(samples[iter]), family="monospace", fontsize=8.5, va="top", parse_math=False)
    axes = curve.subplots()
    axes.plot(
        [row["iter"] for row in evaluations], [row["bits_per_byte"] for row in evaluations], ".-", color="tab:red"
    )
    shown = [row for row in evaluations if row["iter"] in args.at]
    axes.plot([row["iter"] for row in shown], [row["bits_per_byte"] for row in shown], "o", color="tab:red")
    axes.set_xlabel("iteration")
    axes.set_ylabel("validation, bits per byte")
    axes.grid(alpha=0.3)
    return figure


def main() -> None:
    args = tyro.cli(Strip, description=__doc__)
    folder = Path(args.out_dir)
    evaluations = [row for row in rows(folder / "metrics.jsonl") if "val_loss" in row]
    samples = {row["iter"]: row["sample"] for row in rows(folder / "samples.jsonl")}
    if missing := set(args.at) - samples.keys():
        raise UserError(f"--at {min(missing)}: {folder} has samples at {', '.join(map(str, sorted(samples)))}")
    with atomic_write(args.picture) as file:
        draw(args, evaluations, samples).savefig(file, format="png")


if __name__ == "__main__":
    run(main)
