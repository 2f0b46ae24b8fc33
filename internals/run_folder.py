"""OUT_DIR, the folder of a run: its files, and whether a new run may use it."""

import json
import os
from pathlib import Path

from config import TrainConfig
from internals import checkpoint
from internals.settings import with_settings
from internals.start import UserError

# Everything that a run writes, but for config.json
RUN_FILES = ("last.pt", "best.pt", "metrics.jsonl", "samples.jsonl", "loss.png", "run.html", "tracker.json")


def check_own(out_dir: Path) -> None:
    """Raise UserError if files that a run would replace are there, but were not written by a run."""
    names = ["config.json", *RUN_FILES, *(f"{name}.tmp" for name in RUN_FILES)]
    present = [name for name in names if os.path.lexists(out_dir / name)]
    if present and not is_run_folder(out_dir):
        raise UserError(
            f"--out-dir {out_dir} holds {', '.join(present)}, not written by train.py; give another --out-dir, or move "
            "what is there"
        )


def is_run_folder(out_dir: Path) -> bool:
    """Whether train.py wrote the files there. The first that it writes is config.json."""
    try:
        if os.path.lexists(out_dir / "config.json"):
            with_settings(TrainConfig(), json.loads((out_dir / "config.json").read_bytes()))
        else:
            checkpoint.load(next(out_dir / name for name in ("last.pt", "best.pt") if (out_dir / name).exists()))
    except (OSError, TypeError, ValueError, KeyError, UserError, StopIteration):
        return False
    return True


def check_unused(out_dir: Path) -> None:
    """Raise UserError if a new run would delete what an earlier one made."""
    if (out_dir / "last.pt").exists():
        raise UserError(
            f"--out-dir {out_dir} holds a run (last.pt); continue it with --resume, delete it with --overwrite, or give "
            "another --out-dir"
        )
    # A run that was killed before its first last.pt may leave the untrained best.pt of iteration 0: no loss.
    best = out_dir / "best.pt"
    if best.exists() and checkpoint.load(best, mmap=True)["iter"] > 0:
        raise UserError(
            f"--out-dir {out_dir} holds a model (best.pt); delete it with --overwrite, or give another --out-dir"
        )
