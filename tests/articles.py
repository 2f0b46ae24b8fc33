"""Made-up articles, the commands that prepare them, and the contents of a prepared folder."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPO

from config import PrepareConfig
from internals.shards import read_meta, read_tokenizer
from internals.tokenizer import load_tokenizer
from internals.windows import TokenStream

posix = pytest.mark.skipif(os.name != "posix", reason="signals and file-size limits are POSIX")

WORDS = ["the", "of", "Nile", "river", "is", "a", "city", "born", "1887", "king,", "(also", "war.\n\n“Zoë”", "東京", "∑", "émigré"]  # fmt: skip


def make_articles(count, seed=0, words=200):
    rng = random.Random(seed)
    return [
        {
            "id": str(seed * 1_000_000 + n),
            "title": f"Article {seed}/{n}",
            "text": " ".join(rng.choices(WORDS, k=rng.randint(1, 2 * words))),
        }
        for n in range(count)
    ]


def write_parquet(path, rows, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **kwargs)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def config(folder, source, **kwargs):
    """The configuration of `command(folder, source)`."""
    kwargs = {"tokenizer": "bytes", "val_fraction": 0.2, "workers": 2, **kwargs}
    return PrepareConfig(data_dir=str(folder), source=str(source), **kwargs)


def command(folder, source, *more):
    flags = ["--source", source, "--data-dir", folder]
    flags += ["--tokenizer", "bytes", "--val-fraction", "0.2", "--workers", "2"]
    return ["prepare_data.py", *map(str, flags), *map(str, more)]


def start_script(arguments, **kwargs):
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, **kwargs,
    )  # fmt: skip


def files(folder):
    """`{file: SHA-256}` for all files of a folder except the lock."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def texts(folder, split):
    """The articles of a split, decoded."""
    stream, tokenizer = TokenStream.open(folder, split), load_tokenizer(read_tokenizer(folder, read_meta(folder)))
    tokens = stream.read(0, len(stream))
    assert tokens[-1] == tokenizer.eot_token
    parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot_token) + 1)[:-1]
    return [tokenizer.decode_bytes(part[:-1].tolist()).decode() for part in parts]


def as_text(row):
    return f"{row['title']}\n\n{row['text']}"


def stderr_of(process):
    """stderr of a script that has five minutes to end."""
    try:
        return process.communicate(timeout=300)[1]
    finally:
        process.kill()


def kill_until(kills, arguments, folder, want, shortest=0.0, longest=1.5, **kwargs):
    """Kill a script `kills` times at random moments. Whenever it finishes, `files(folder)` must be `want`."""
    rng, survived, finished = random.Random(0), 0, 0
    while survived < kills:
        # Count the seconds from the lock: a kill before that hits Python's imports, which is no test.
        (folder / ".lock").unlink(missing_ok=True)
        process, deadline = start_script(arguments, **kwargs), time.monotonic() + 60
        while not (folder / ".lock").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the folder was not locked: {stderr_of(process)}")
            time.sleep(0.01)
        begin = time.monotonic()
        try:
            _, stderr = process.communicate(timeout=rng.uniform(shortest, longest))
            longest = min(longest, time.monotonic() - begin)  # this machine needs no more: the next kill comes before
        except subprocess.TimeoutExpired:
            process.kill()
            survived += 1
            stderr = stderr_of(process)
        assert process.returncode in (0, -signal.SIGKILL), stderr
        if process.returncode == 0:
            assert files(folder) == want
            finished += 1
            for path in folder.iterdir():
                path.unlink()
    process = start_script(arguments, **kwargs)
    stderr = stderr_of(process)
    assert process.returncode == 0, stderr
    assert files(folder) == want
    print(f"{survived} kills survived, {finished + 1} preparations finished")
