"""Save the losses of a finished run as sample/PRESET.json. train.py prints them next to yours.

    python train.py --preset demo
    python benchmarks/reference.py checkpoints/demo --hardware "2 cores of an AMD EPYC"

The run must use the preset's own settings. The working tree must be committed, because the file records the commit.
"""

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from common import REPO

from config import TrainConfig
from internals import checkpoint, report
from internals.cli import with_preset
from internals.files import write_json
from internals.settings import differences
from internals.start import UserError, run


@dataclass(frozen=True)
class Reference:
    out_dir: tyro.conf.Positional[str]  # of the finished run
    hardware: str  # what it ran on, in words


def git(*command: str) -> str:
    return subprocess.run(["git", *command], cwd=REPO, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    args = tyro.cli(Reference, description=__doc__)
    last = checkpoint.load(Path(args.out_dir) / "last.pt")
    settings = {name: value for name, value in last["config"].items() if name not in report.NOT_LEARNING}
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
    if git("status", "--porcelain", "--untracked-files=no"):
        raise UserError("the working tree has uncommitted changes; commit them and train again")
    rows = report.read_metrics(Path(args.out_dir) / "metrics.jsonl")
    contents = {
        "preset": preset,
        "seed": last["config"]["seed"],
        "hardware": f"{args.hardware}, {last['machine']['dtype']}, PyTorch {last['machine']['torch']}",
        "date": time.strftime("%Y-%m-%d"),
        "commit": git("rev-parse", "HEAD"),
        "tokens": {row["iter"]: row["tokens"] for row in rows if "val_loss" in row},
        "val_loss": {row["iter"]: round(row["val_loss"], 4) for row in rows if "val_loss" in row},
        "settings": settings,
        "data_sha256": last["data"]["sha256"],
    }
    path = report.REFERENCES / f"{preset}.json"
    write_json(path, contents)
    print(f"{path}: {len(contents['val_loss'])} evaluations, the last {rows[-1]['val_loss']:.4f}")


if __name__ == "__main__":
    run(main)
