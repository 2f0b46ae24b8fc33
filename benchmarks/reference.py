"""Save the losses of a finished run as sample/PRESET.json. train.py prints them next to yours.

    python train.py --preset demo
    python benchmarks/reference.py checkpoints/demo --hardware "2 cores of an AMD EPYC"

The run must use the preset's own settings. The working tree must be committed, because the file records the commit.
"""

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from common import REPO

from config import TrainConfig
from internals import checkpoint, reference
from internals.cli import with_preset
from internals.files import write_json
from internals.progress import describe_source
from internals.run_folder import Rows
from internals.settings import differences
from internals.start import UserError, run


@dataclass(frozen=True)
class Reference:
    out_dir: tyro.conf.Positional[str]  # of the finished run
    hardware: str  # what it ran on, in words
    text: str = ""  # what it was trained on, in words; empty: what the checkpoint says of its source


def git(*command: str) -> str:
    return subprocess.run(["git", *command], cwd=REPO, capture_output=True, text=True, check=True).stdout.strip()


def contents(args: Reference, commit: str) -> dict[str, Any]:
    """The contents of sample/PRESET.json."""
    last = checkpoint.load(Path(args.out_dir) / "last.pt")
    settings = {name: value for name, value in last["config"].items() if name not in reference.NOT_LEARNING}
    preset = last["config"]["preset"]
    own = with_preset(TrainConfig, preset).settings()
    own["model"]["vocab_size"] = settings["model"]["vocab_size"]  # vocab_size follows from the data
    if changed := differences(own, settings, own):
        raise UserError(
            f"{args.out_dir}: this run does not use the settings of the preset {preset} ({', '.join(changed)}); train it again without flags"
        )
    if last["iter"] != settings["max_iters"]:
        raise UserError(
            f"{args.out_dir}: this run is at iteration {last['iter']:,} of {settings['max_iters']:,}; finish it first"
        )
    rows = [row for row in Rows(Path(args.out_dir) / "metrics.jsonl", until=last["iter"]).rows if "val_loss" in row]
    return {
        "preset": preset,
        "seed": last["config"]["seed"],
        "text": args.text or describe_source(last["data"]["source"]),
        "hardware": f"{args.hardware}, {last['machine']['dtype']}, PyTorch {last['machine']['torch']}",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "tokens": {row["iter"]: row["tokens"] for row in rows},
        "val_loss": {row["iter"]: round(row["val_loss"], 4) for row in rows},
        "bits_per_byte": {row["iter"]: round(row["bits_per_byte"], 4) for row in rows},
        "settings": settings,
        "data_sha256": last["data"]["sha256"],
    }


def main() -> None:
    args = tyro.cli(Reference, description=__doc__)
    if git("status", "--porcelain", "--untracked-files=no"):
        raise UserError("the working tree has uncommitted changes; commit them and train again")
    saved = contents(args, git("rev-parse", "HEAD"))
    path = reference.REFERENCES / f"{saved['preset']}.json"
    write_json(path, saved)
    last = max(saved["val_loss"])
    print(
        f"{path}: {len(saved['val_loss'])} evaluations, the last {saved['val_loss'][last]:.4f} nats per token, "
        f"{saved['bits_per_byte'][last]:.4f} bits per byte"
    )


if __name__ == "__main__":
    run(main)
