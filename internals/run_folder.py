"""OUT_DIR, the folder of a run: its files, and whether a new run may use it."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from internals import checkpoint
from internals.files import atomic_write, nearest_folder, writing
from internals.screen import printable
from internals.start import UserError

# What a new run deletes of an earlier one. It rewrites config.json, and trackers have files of their own
RUN_FILES = ("last.pt", "best.pt", "metrics.jsonl", "samples.jsonl", "loss.png", "run.html", "tracker.json")


def check_own(out_dir: Path) -> None:
    """Raise UserError if files that a run would replace are there, but were not written by a run."""
    names = ["config.json", *RUN_FILES, *(f"{name}.tmp" for name in RUN_FILES)]
    present = [name for name in names if os.path.lexists(out_dir / name)]
    if not present or has_settings(out_dir / "config.json"):  # config.json is the first file that a run writes
        return
    if not (content(out_dir / "last.pt") or content(out_dir / "best.pt")):
        raise UserError(
            f"--out-dir {out_dir} holds {', '.join(present)}, not written by train.py; give another --out-dir, or move "
            "what is there"
        )
    if "config.json" in present:
        raise UserError(
            f"--out-dir {out_dir}: its config.json does not hold the settings of a run; delete it (last.pt has the "
            "settings, too), or give another --out-dir"
        )


def check_folder(out_dir: Path) -> None:
    """Raise UserError if somebody named a file in the folder."""
    if out_dir.is_file():
        raise UserError(f"--out-dir {out_dir}: is a file; give a folder, such as {out_dir.parent}")


def check_writable(out_dir: Path) -> None:
    """Raise UserError if nothing can be written there, before minutes of measuring or compiling."""
    folder = nearest_folder(out_dir)
    if not os.access(folder, os.W_OK):
        raise UserError(
            f"--out-dir {out_dir}: {folder} cannot be written; make it writable, or name a folder that is (of a run to resume, a copy)"
        )


def has_settings(config_json: Path) -> bool:
    """Whether a file has the form of a run's settings, those of another version among them."""
    try:
        settings = json.loads(config_json.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(settings, dict) and {"max_iters", "tokens_per_iter", "model"} <= settings.keys()


def content(path: Path) -> dict[str, Any]:
    """What a checkpoint holds; empty if it cannot be read."""
    with contextlib.suppress(UserError):
        return checkpoint.load(path, mmap=True)
    return {}


def check_unused(out_dir: Path) -> None:
    """Raise UserError if a new run would delete what an earlier one made.

    Call `check_own` first: files that no run wrote cannot be resumed or overwritten, so the advice here would be wrong.
    A run that was killed before its first last.pt may leave the untrained best.pt of iteration 0, and rows of it: no loss.
    """
    last, best = out_dir / "last.pt", out_dir / "best.pt"
    if last.exists():
        raise UserError(
            f"--out-dir {out_dir} holds a run (last.pt); continue it with --resume, delete it with --overwrite, or give "
            "another --out-dir"
        )
    if best.exists() and content(best).get("iter") != 0:  # one that cannot be read may be worth something
        raise UserError(
            f"--out-dir {out_dir} holds a model (best.pt); delete it with --overwrite, or give another --out-dir"
        )
    if kept := kept_records(out_dir):
        raise UserError(
            f"--out-dir {out_dir} holds files of a run whose checkpoints are gone ({', '.join(kept)}); move them, delete "
            "them with --overwrite, or give another --out-dir"
        )


def check_source_stays(init_from: str, out_dir: Path) -> None:
    """Raise UserError if `--overwrite` would delete the model of `--init-from`."""
    source = Path(os.path.expanduser(init_from))
    deleted = [path for path in (out_dir / "best.pt", out_dir / "last.pt") if path.exists()]
    if deleted:  # without one, the folder's name may be that of a model on the hub
        deleted.append(out_dir)
    if init_from and source.exists() and any(source.samefile(path) for path in deleted):
        raise UserError(
            f"--init-from {init_from}: --overwrite deletes this model; copy it to another folder first, or give another "
            "--out-dir"
        )


def delete_run(out_dir: Path) -> None:
    with writing(out_dir, advice="the earlier run may be partly deleted"):
        for name in ("last.pt", "best.pt", "tracker.json"):
            (out_dir / name).unlink(missing_ok=True)
    for name in RUN_FILES:  # the others are replaced anyway: a file that is open in a program of Windows may stay
        with contextlib.suppress(OSError):
            (out_dir / name).unlink(missing_ok=True)


def kept_records(out_dir: Path) -> list[str]:
    """The curves and samples in a folder without checkpoints, but not those of a run that was killed at iteration 0."""
    tables = {name: Rows(out_dir / name, until=sys.maxsize) for name in ("metrics.jsonl", "samples.jsonl")}
    kept = [name for name, t in tables.items() if len(t.lines) > len(t.rows) or any(row["iter"] > 0 for row in t.rows)]
    if kept or not tables["metrics.jsonl"].rows:  # the killed run drew its curves from a row of iteration 0
        kept += [name for name in ("loss.png", "run.html") if os.path.lexists(out_dir / name)]
    return kept


class Rows:
    """metrics.jsonl or samples.jsonl: all rows in memory, and which of them are not yet in the file.

    A resumed run keeps the rows up to its first iteration, `until`; a new run (None) keeps nothing. Lines that are not
    rows of this project (a blank line, a note, a damaged line) stay where they are; only a half-written last line is
    dropped.
    """

    def __init__(self, path: Path, until: int | None, repair: bool = False):
        self.path, self.repair, self.rows = path, repair, []
        self.lines: list[bytes] = []  # of the file, without those that wait
        self.waiting: list[bytes] = []
        self.torn = True  # the file may differ from `lines`: not cut back yet, or the last write failed half-way
        *lines, last = (b"" if until is None else self._read()).split(b"\n")
        for line in [*lines, last] if parse_row(last) else lines:
            row = parse_row(line)
            if row is None or row["iter"] <= until:
                self.lines.append(line + b"\n")
                self.rows += [row] if row else []

    def _read(self) -> bytes:
        """The file's content. With `repair`, one that cannot be read is moved aside: it must not keep a run from
        resuming."""
        try:
            return self.path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return b""
        except OSError as error:
            what = f"{self.path}: cannot be read ({error.strerror})"
            if not self.repair:
                raise UserError(what) from error
            aside = self.path.with_name(f"{self.path.name}.unreadable-{time.time_ns()}")
            try:
                os.rename(self.path, aside)
                tqdm.write(printable(f"{what}; it was renamed to {aside.name}, and a new file is started"))
            except OSError as refusal:
                tqdm.write(printable(f"{what} and cannot be renamed ({refusal.strerror})"))
            return b""

    def cut(self) -> None:
        """Rewrite the file from `lines`."""
        with atomic_write(self.path) as file:
            file.writelines(self.lines)
        self.torn = False

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.waiting.append(json.dumps(row).encode() + b"\n")

    def flush(self) -> None:
        """Append the waiting rows and sync the file. If the disk fails, raises its error, and the rows keep waiting."""
        if not self.waiting:
            return
        if self.torn:
            self.cut()
        self.torn = True
        with writing(self.path), open(self.path, "ab") as file:
            file.writelines(self.waiting)
            file.flush()
            os.fsync(file.fileno())
        self.torn = False
        self.lines += self.waiting
        self.waiting = []


def parse_row(line: bytes) -> dict[str, Any] | None:
    """A row of metrics.jsonl or samples.jsonl. None for any other line."""
    try:
        row = json.loads(line)
        json.dumps(row, allow_nan=False)  # raises for NaN and infinity, which run.html cannot hold
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("iter"), int) else None
