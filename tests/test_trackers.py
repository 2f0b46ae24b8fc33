"""`--tracker`: each store holds the rows of metrics.jsonl, even after a kill and a resume; no tracker disturbs the run.

The stores are read back with the trackers' packages or, if these have no reader, byte by byte. Without the packages
(`pip install -r requirements-trackers.txt`) those tests are skipped.
"""

import importlib.util
import json
import os
import sqlite3
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO, run_script
from runs import assert_same_end, flags, tiny

import train
from internals import checkpoint, trackers
from internals.start import UserError

pytestmark = pytest.mark.usefixtures("quick")

BLOCK, HEADER = 32_768, 7  # of the log format of LevelDB, which wandb uses

STUCK_AT_13 = (
    "import sys, time, train; from config import TrainConfig; from internals import cli, report\n"
    "report.plot = lambda *of_the_curves: None\n"
    "real = train.get_lr; train.get_lr = lambda it, cfg: (time.sleep(600 * (it == 13)), real(it, cfg))[1]\n"
    "train.main(cli.parse(TrainConfig, '', sys.argv[1:]))"
)


def read_tensorboard(out_dir: Path) -> tuple[dict, set, str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out_dir / "tensorboard"), {"scalars": 0, "tensors": 0}).Reload()
    rows: dict[int, dict] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            assert name not in rows.get(event.step, {}), "a step twice"
            rows.setdefault(event.step, {"iter": event.step})[name] = event.value
    config = events.Tensors("config/text_summary")[-1].tensor_proto.string_val[0].decode()
    return rows, {"tensorboard"}, config


def read_wandb(out_dir: Path) -> tuple[dict, set, str]:
    from wandb.proto import wandb_internal_pb2

    rows: dict[int, dict] = {}
    ids, config = set(), ""
    for path in sorted((out_dir / "wandb").glob("offline-run-*/run-*.wandb"), key=os.path.getmtime):
        for raw in log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(raw)
            if record.HasField("run"):
                ids.add(record.run.run_id)
                config = "".join(f'"{item.key}": {item.value_json}\n' for item in record.run.config.update) or config
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            if "iter" in items:
                rows[items["iter"]] = {name: value for name, value in items.items() if not name.startswith("_")}
    return rows, ids, config


def log_records(content: bytes):
    """The records of a .wandb file: pieces with a checksum, a length and a kind, in blocks."""
    assert content.startswith(b":W&B")
    place, parts = HEADER, []
    while place + HEADER <= len(content):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        if kind == 0:  # the rest of the block is empty
            place += BLOCK - place % BLOCK
            continue
        parts.append(content[place + HEADER : place + HEADER + length])
        place += HEADER + length
        if kind in (1, 4):  # whole, or the last piece
            yield b"".join(parts)
            parts = []


def read_trackio(out_dir: Path) -> tuple[dict, set, str]:
    with sqlite3.connect(out_dir.parent / "trackio" / "wikipedia-transformer.db") as store:
        found = store.execute("select run_id, step, metrics from metrics order by id").fetchall()
        ((config,),) = store.execute("select config from configs").fetchall()
    rows = {step: json.loads(metrics) for _, step, metrics in found}
    return rows, {id for id, _, _ in found}, config if isinstance(config, str) else config.decode()


READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb, "trackio": read_trackio}


@pytest.mark.parametrize("name", READERS)
def test_killed_and_resumed_the_store_holds_every_row(data_dir, tmp_path, straight, name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}: pip install -r requirements-trackers.txt")
    out_dir = tmp_path / "run"
    env = {**os.environ, "WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"), "TMPDIR": str(tmp_path)}
    arguments = flags(data_dir, out_dir, tracker=name)
    command = [sys.executable, "-c", STUCK_AT_13, *arguments]
    child, deadline = subprocess.Popen(command, cwd=REPO, env=env, stdout=subprocess.DEVNULL), time.monotonic() + 200
    try:
        while not (out_dir / "metrics.jsonl").exists() or (out_dir / "metrics.jsonl").read_text().count("\n") < 14:
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        child.kill()  # after iteration 13: last.pt is at 10, and 11 to 13 are repeated
        child.wait()
    resumed = run_script("train.py", *arguments, "--resume", env=env)
    assert resumed.returncode == 0 and "continues without" not in resumed.stdout, resumed.stdout + resumed.stderr
    assert "at iteration 10" in resumed.stdout

    rows, ids, config = READERS[name](out_dir)
    expected = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    assert sorted(rows) == [row["iter"] for row in expected] == list(range(21))
    for row in expected:
        named = {key: value for key, value in row.items() if value is not None}
        assert rows[row["iter"]] == pytest.approx(named, rel=1e-6), row["iter"]
    assert len(ids) == 1
    assert '"learning_rate":0.01' in config.replace(" ", "")
    assert_same_end(out_dir, straight)


@pytest.mark.parametrize("name", READERS)
def test_without_its_package_a_tracker_costs_one_line(data_dir, tmp_path, monkeypatch, straight, capsys, name):
    for module in (name, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    train.train(tiny(data_dir, tmp_path, tracker=name))
    out = capsys.readouterr().out
    assert (
        out.count(f"--tracker {name}: ") == 1 and "pip install -r requirements-trackers.txt; training continues" in out
    )
    assert out.index("--tracker") < out.index(" 0/20  val ")
    assert_same_end(tmp_path, straight)


class Recorder:
    """A store that fails at the call `fails`, or never."""

    late = trackers.RECENT

    def __init__(self, fails: str = ""):
        self.fails, self.calls, self.rows = fails, [], []

    def call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails:
            raise ConnectionError("the tracker's server is on holiday\nand a page of others")

    def log(self, row):
        self.call("log")
        self.rows.append(row)

    def flush(self):
        self.call("flush")

    def close(self):
        self.call("close")


@pytest.mark.parametrize("fails", ["log", "flush", "close"])
def test_a_tracker_that_fails_costs_one_line(data_dir, tmp_path, monkeypatch, straight, capsys, fails):
    store = Recorder(fails)
    monkeypatch.setitem(trackers.STORES, "wandb", lambda run, id: store)
    train.train(tiny(data_dir, tmp_path, tracker="wandb"))
    line = "--tracker wandb: the tracker's server is on holiday; training continues without it"
    assert capsys.readouterr().out.count(line) == 1
    assert store.calls.count(fails) == 1 and store.calls[-1] == fails  # it is not asked again
    assert_same_end(tmp_path, straight)


def test_a_tracker_that_joins_later_gets_every_row_and_a_new_run_a_new_name(data_dir, tmp_path, monkeypatch):
    stores = {}

    def make(run, id):
        return stores.setdefault(id, Recorder())

    for name in ("wandb", "trackio"):
        monkeypatch.setitem(trackers.STORES, name, make)
    train.train(tiny(data_dir, tmp_path, max_iters=8))
    train.train(tiny(data_dir, tmp_path, max_iters=12, resume=True, tracker="wandb"))
    train.train(tiny(data_dir, tmp_path, max_iters=16, resume=True, tracker="wandb"))
    (store,) = stores.values()
    assert {row["iter"] for row in store.rows} == set(range(17))
    train.train(tiny(data_dir, tmp_path, max_iters=18, resume=True, tracker="trackio"))  # another tracker gets all rows
    assert [row["iter"] for row in list(stores.values())[1].rows] == list(range(19))
    train.train(tiny(data_dir, tmp_path, max_iters=1, overwrite=True, tracker="trackio"))
    assert len(stores) == 3 and [row["iter"] for row in list(stores.values())[2].rows] == [0, 1]


def test_a_tracker_that_comes_back_gets_the_rows_in_between_once(data_dir, tmp_path, monkeypatch):
    stores = {}

    def make(run, id):
        stores.setdefault(id, Recorder()).late = 0.0
        return stores[id]

    for name in ("wandb", "trackio"):
        monkeypatch.setitem(trackers.STORES, name, make)
    for max_iters, name in ((8, "wandb"), (12, "none"), (14, "wandb"), (16, "trackio"), (20, "wandb")):
        train.train(tiny(data_dir, tmp_path, max_iters=max_iters, resume=max_iters > 8, tracker=name))
    first, second = ([row["iter"] for row in store.rows] for store in stores.values())
    assert (first, second) == (list(range(21)), list(range(17)))


def test_a_tracker_that_was_killed_gets_the_rows_that_the_run_made_without_it(data_dir, tmp_path, monkeypatch):
    """tracker.json has no `sent` of it: a killed process cannot write one."""
    store = Recorder()
    store.late = 0.0
    monkeypatch.setitem(trackers.STORES, "wandb", lambda run, id: store)
    train.train(tiny(data_dir, tmp_path, max_iters=8, tracker="wandb"))
    record = json.loads((tmp_path / "tracker.json").read_text())["wandb"]
    (tmp_path / "tracker.json").write_text(json.dumps({"wandb": {"id": record["id"]}}))
    for max_iters, name in ((12, "none"), (16, "wandb")):
        train.train(tiny(data_dir, tmp_path, max_iters=max_iters, resume=True, tracker=name))
    assert [row["iter"] for row in store.rows] == list(range(17))


def test_tensorboard_that_was_killed_forgets_the_rows_that_the_run_made_again_without_it(data_dir, tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install -r requirements-trackers.txt")
    last, record = tmp_path / "last.pt", tmp_path / "tracker.json"
    train.train(tiny(data_dir, tmp_path, max_iters=8, tracker="tensorboard"))
    saved = last.read_bytes()
    train.train(tiny(data_dir, tmp_path, max_iters=12, resume=True, tracker="tensorboard"))
    last.write_bytes(saved)  # as if it had been killed before it saved again
    record.write_text(json.dumps({"tensorboard": {"id": json.loads(record.read_text())["tensorboard"]["id"]}}))
    train.train(tiny(data_dir, tmp_path, max_iters=12, resume=True, learning_rate=2e-3, tracker="none"))
    train.train(tiny(data_dir, tmp_path, max_iters=16, resume=True, tracker="tensorboard"))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    stored, _, _ = read_tensorboard(tmp_path)
    assert sorted(stored) == [row["iter"] for row in rows] == list(range(17))
    for row in rows[1:]:
        assert stored[row["iter"]]["train_loss"] == pytest.approx(row["train_loss"], rel=1e-5)


def test_a_tracker_that_failed_gets_every_row_later(data_dir, tmp_path, monkeypatch):
    """It fails at the start of a new run, in the middle of one, and at the start of a resumed one."""

    def missing(run, id):
        raise ImportError("no package wandb")

    class Failing(Recorder):
        def log(self, row):
            if row["iter"] == 14:
                raise OSError("no network")
            super().log(row)

    rows = []
    for max_iters, make in ((8, missing), (12, Recorder), (16, Failing), (18, missing), (20, Recorder)):
        store = make() if make is not missing else None
        if store:
            store.late = 0.0
        monkeypatch.setitem(trackers.STORES, "wandb", lambda run, id, store=store: store or missing(run, id))
        train.train(tiny(data_dir, tmp_path, max_iters=max_iters, resume=max_iters > 8, tracker="wandb"))
        rows += [row["iter"] for row in store.rows] if store else []
    assert rows == list(range(21))


def test_a_disk_that_is_full_for_a_while_costs_the_store_no_row(data_dir, tmp_path, monkeypatch):
    """The store fails, and tracker.json cannot say which row was the last. At the end of the run it can."""
    store, write_json = Recorder(), trackers.write_json
    store.late = 0.0
    monkeypatch.setitem(trackers.STORES, "wandb", lambda run, id: store)

    def fail(row):
        if row["iter"] == 5:
            monkeypatch.setattr(store, "log", store.rows.append)
            monkeypatch.setattr(trackers, "write_json", full)
            raise OSError("No space left on device")
        store.rows.append(row)

    def full(path, content):
        monkeypatch.setattr(trackers, "write_json", write_json)
        raise UserError("the disk is full")

    monkeypatch.setattr(store, "log", fail)
    train.train(tiny(data_dir, tmp_path, max_iters=8, tracker="wandb"))
    assert [row["iter"] for row in store.rows] == list(range(5))
    train.train(tiny(data_dir, tmp_path, max_iters=9, resume=True, tracker="wandb"))
    assert [row["iter"] for row in store.rows] == list(range(10))


def test_a_row_that_somebody_edited_costs_the_store_and_not_the_run(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(trackers.STORES, "trackio", lambda run, id: Recorder())
    train.train(tiny(data_dir, tmp_path, max_iters=8, tracker="trackio"))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows[3]["seconds"] = "three"
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tracker.json").write_text(json.dumps({"tracker": "trackio", "id": "1"}))
    train.train(tiny(data_dir, tmp_path, max_iters=9, resume=True, tracker="trackio"))
    assert checkpoint.load(tmp_path / "last.pt")["iter"] == 9
    assert "trackio" in capsys.readouterr().out


def test_a_resumed_run_sends_the_last_seconds_again(data_dir, tmp_path, monkeypatch):
    """A killed process may have handed over rows that its tracker had not yet stored."""
    store = Recorder()
    monkeypatch.setitem(trackers.STORES, "trackio", lambda run, id: store)
    for late, again in ((1e9, list(range(10))), (0.0, [9])):
        store.late = late
        train.train(tiny(data_dir, tmp_path, max_iters=8, overwrite=True, tracker="trackio"))
        store.rows.clear()
        train.train(tiny(data_dir, tmp_path, max_iters=9, resume=True, tracker="trackio"))
        assert [row["iter"] for row in store.rows] == again
