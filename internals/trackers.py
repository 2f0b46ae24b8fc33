"""`--tracker`: sends the rows of metrics.jsonl to TensorBoard, Weights & Biases or Trackio, too.

A tracker is imported only if it is asked for. It changes nothing in the run, and its failure costs one line of output.
"""

import contextlib
import json
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from internals.files import write_json
from internals.run import Run
from internals.screen import printable
from internals.start import UserError, first_line

PROJECT = "wikipedia-transformer"
RECENT = 10.0  # seconds of training; when a run is killed, a tracker may not have stored rows this recent
FINISH_SECONDS = 120.0  # that a tracker may take at the end of a run to send its last rows


class Store(Protocol):
    """The destination of rows. A resumed run sends those of the last `late` seconds again."""

    late: float

    def log(self, row: dict[str, Any]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """The store of `--tracker`, or none. The first failure is reported and ends its use; training continues."""

    def __init__(self, name: str):
        self.name = name
        self.store: Store | None = None
        self.path: Path | None = None  # of tracker.json, once open
        self.sent = -1.0  # `seconds` of the last row that was handed over

    def open(self, run: Run, rows: list[dict[str, Any]]) -> None:
        """Start, or continue if the run was started with this tracker. `rows`: those of the run so far."""
        path = run.out_dir / "tracker.json"
        records = read_records(path)
        for record in records.values():  # one without `sent` was in use when its process was killed, and has all rows
            record.setdefault("sent", rows[-1].get("seconds", 0.0) if rows else 0.0)
        if records:
            with contextlib.suppress(UserError):  # the disk is full
                write_json(path, records)
        if self.name == "none":
            return
        self.path, saved = path, records.get(self.name, {})
        self.id, self.sent = saved.get("id") or new_id(run.out_dir), saved.get("sent", self.sent)

        def connect() -> None:
            self.store = STORES[self.name](run, self.id)
            since = self.sent - self.store.late
            for row in rows:
                if row.get("seconds", 0.0) > since:
                    self._send(row)
            self._remember()

        self._attempt(connect)

    def log(self, row: dict[str, Any]) -> None:
        if self.store:
            self._attempt(lambda: self._send(row))

    def _send(self, row: dict[str, Any]) -> None:
        self.store.log(row)
        self.sent = row.get("seconds", self.sent)

    def flush(self) -> None:
        if self.store:
            self._attempt(self.store.flush)

    def close(self) -> None:
        def close() -> None:
            self.store.close()
            self._remember(sent=self.sent)  # what the run writes without this tracker goes to it later

        if self.store:
            self._attempt(close)
        elif self.path:  # it failed, perhaps on a full disk that has room again
            with contextlib.suppress(UserError):
                self._remember(sent=self.sent)

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a package, a network, an account, a disk: no such failure is worth an iteration
            self.store = None
            reason = first_line(error)
            if isinstance(error, ImportError):
                reason += "; pip install -r requirements-trackers.txt"
            tqdm.write(printable(f"--tracker {self.name}: {reason}; training continues without it"))
            with contextlib.suppress(UserError):  # the disk is full
                self._remember(sent=self.sent)  # the rows from here on go to it when it works again

    def _remember(self, **values: float) -> None:
        write_json(self.path, read_records(self.path) | {self.name: {"id": self.id, **values}})


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """What OUT_DIR/tracker.json says of each tracker: `id`, and `sent` unless the process was killed while it was used.
    Empty if it says nothing."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        saved = json.loads(path.read_bytes())
        if isinstance(saved.get("tracker"), str):  # until 2026-11-27 it held one tracker
            saved = {saved["tracker"]: saved}
        return {
            name: {"id": str(record["id"]), **({"sent": float(record["sent"])} if "sent" in record else {})}
            for name, record in saved.items()
        }
    return {}


def new_id(out_dir: Path) -> str:
    """A name for the run in a tracker: `checkpoints/demo -> demo-1f0c9a3e`."""
    return f"{re.sub(r'[^A-Za-z0-9_-]', '-', out_dir.resolve().name)}-{secrets.token_hex(4)}"


class TensorBoard:
    """Event files in OUT_DIR/tensorboard. They are flushed before each checkpoint."""

    late = 0.0

    def __init__(self, run: Run, id: str):
        import torch.utils.tensorboard  # noqa: F401  (now, so that a missing package is known before the first row)

        self.run, self.writer = run, None

    def begin(self, first_row: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        next_iter = 0 if self.run.resumed_at is None else self.run.resumed_at + 1
        first = min(first_row, next_iter)  # earlier, if the rows of a stretch without TensorBoard come first
        # purge_step hides the old rows from this step on
        writer = SummaryWriter(str(self.run.out_dir / "tensorboard"), purge_step=first)
        settings = json.dumps(self.run.cfg.settings(), indent=4)
        writer.add_text("config", re.sub("^", "    ", settings, flags=re.M), first)
        return writer

    def log(self, row: dict[str, Any]) -> None:
        self.writer = self.writer or self.begin(row["iter"])
        for name, value in row.items():
            if name != "iter" and value is not None:
                self.writer.add_scalar(name, value, row["iter"])

    def flush(self) -> None:
        if self.writer:
            self.writer.flush()

    def close(self) -> None:
        if self.writer:
            self.writer.close()


class Wandb:
    """Weights & Biases, in its cloud or, with WANDB_MODE=offline, in OUT_DIR/wandb."""

    late = RECENT

    def __init__(self, run: Run, id: str):
        self.run = self.begin(run, id)

    def begin(self, run: Run, id: str) -> Any:
        import wandb

        begun = wandb.init(
            project=PROJECT,
            id=id,
            name=id,
            resume="allow",
            config=run.cfg.settings(),
            dir=str(run.out_dir),
            settings=wandb.Settings(console="off", finish_timeout=FINISH_SECONDS),
        )
        # wandb's own steps must grow, but a resumed run repeats those after last.pt, so the iteration is the axis
        begun.define_metric("iter")
        begun.define_metric("*", step_metric="iter")
        return begun

    def log(self, row: dict[str, Any]) -> None:
        self.run.log({name: value for name, value in row.items() if value is not None})

    def flush(self) -> None:
        pass  # wandb's own process writes the rows

    def close(self) -> None:
        self.run.finish()


class Trackio(Wandb):
    """Trackio, which has the interface of wandb: in its own folder (TRACKIO_DIR) or on a Space of the hub."""

    def begin(self, run: Run, id: str) -> Any:
        import trackio

        return trackio.init(project=PROJECT, name=id, resume="allow", config=run.cfg.settings(), embed=False)

    def log(self, row: dict[str, Any]) -> None:
        self.run.log({name: value for name, value in row.items() if value is not None}, step=row["iter"])


STORES: dict[str, Callable[[Run, str], Store]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}
