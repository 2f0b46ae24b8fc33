"""How fast prepare_data.py is and how much memory it takes, next to the tokenizers alone and to the usual way.

    TIKTOKEN_CACHE_DIR=... WIKIPEDIA_SAMPLE_DIR=FOLDER_OF_PARQUET_FILES python benchmarks/prepare.py

    ours      the whole command `prepare_data.py --source FOLDER`, from the start of Python to its end
    without   the same as if gigatoken were not installed
    gigatoken gigatoken alone, all articles in one call, already in memory, with as many threads
    tiktoken  tiktoken alone, as it comes, on the same articles, already in memory, in as many processes
    limit     the same with the pattern of internals/tokenizer_json.py, which gives the same pieces faster
    usual     load_dataset, Dataset.map(num_proc), np.memmap, like nanoGPT's prepare.py and its descendants

`ours`, `without` and `usual` include the start of Python, the others do not. `--times 4` makes that a small part. All
are timed in turns. The tables show medians and bests of the repetitions, and their ratios. On a busy machine, compare
the tokens per second of processor time (user and system, of all threads and processes).
"""

import contextlib
import importlib.util
import multiprocessing
import os
import platform
import queue
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import tiktoken
import tyro
from common import REPO

from internals.bulk_encoding import rank_lines
from internals.shards import read_meta
from internals.start import UserError, run
from internals.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Timing:
    tokens: int
    seconds: float
    cpu_seconds: float  # of all threads and processes
    peak_bytes: int = 0  # resident


WITHOUT_GIGATOKEN = (
    "import runpy, sys; sys.modules['gigatoken'] = None; sys.argv[0] = 'prepare_data.py'; "
    "runpy.run_path('prepare_data.py', run_name='__main__')"
)


def cpu_seconds_of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def run_ours(source: Path, workers: int, folder: Path, script: tuple[str, ...] = ("prepare_data.py",)) -> Timing:
    command = [sys.executable, *script, "--source", source, "--data-dir", folder, "--workers", workers]
    start = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), cwd=REPO, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds, process.returncode = time.perf_counter() - start, os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"prepare_data.py ended with status {process.returncode}, see above")
    tokens = sum(split["tokens"] for split in read_meta(folder)["splits"].values())
    # In KB, on Linux. It counts from the fork on, so it is never less than what this process takes (0.1 GB).
    peak_bytes = 1024 * used.ru_maxrss
    return Timing(tokens, seconds, used.ru_utime + used.ru_stime, peak_bytes)


def read_texts(source: Path, with_titles: bool) -> list[str]:
    texts = []
    for path in sorted(source.glob("*.parquet")):
        for row in pq.read_table(path, columns=["title", "text"]).to_pylist():
            texts.append(f"{row['title']}\n\n{row['text']}" if with_titles else row["text"])
    return texts


def encode_share(way: str, texts: list[str], barrier, results) -> None:
    """One process: encode its share of the texts, once all processes are ready."""
    encoding = load_tokenizer("gpt2") if way == "limit" else tiktoken.get_encoding("r50k_base")  # gpt2 in one file
    barrier.wait()
    start, cpu = time.perf_counter(), time.process_time()
    tokens = sum(len(encoding.encode_to_numpy(text, disallowed_special=())) + 1 for text in texts)
    results.put(Timing(tokens, time.perf_counter() - start, time.process_time() - cpu))


def run_alone(way: str, source: Path, workers: int, with_titles: bool = True) -> Timing:
    """tiktoken alone: its tokens plus an end-of-text per article, the seconds of the slowest process."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(workers), context.Queue()
    texts = read_texts(source, with_titles)
    processes = [
        context.Process(target=encode_share, args=(way, texts[n::workers], barrier, results)) for n in range(workers)
    ]
    for process in processes:
        process.start()
    timings = answers(processes, results)
    return Timing(
        sum(timing.tokens for timing in timings),
        max(timing.seconds for timing in timings),
        sum(timing.cpu_seconds for timing in timings),
    )


def answers(processes: list[Any], results: Any) -> list[Timing]:
    """What the processes put into the queue `results`, one each.

    Raises:
        UserError: one of them failed; the others are ended, since they may wait for it.
    """
    found: list[Timing] = []
    while len(found) < len(processes):
        with contextlib.suppress(queue.Empty):
            found.append(results.get(timeout=1))
        if any(process.exitcode for process in processes):
            for process in processes:
                process.terminate()
            raise UserError("a process failed, see above")
    for process in processes:
        process.join()
    return found


def encode_all(texts: list[bytes], workers: int, vocabulary: bytes, results) -> None:
    """In a process with an empty gigatoken cache: encode all texts in one call."""
    os.environ["RAYON_NUM_THREADS"] = str(workers)  # before the library starts its threads
    import awkward  # noqa: F401  (it would be imported within the timed call)
    import gigatoken

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vocabulary")
        path.write_bytes(vocabulary)
        tokenizer = gigatoken.Tokenizer.from_tiktoken(path, "gpt2", {})
    start, cpu = time.perf_counter(), time.process_time()
    rows = tokenizer.encode_batch(texts, parallel=True)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    results.put(Timing(len(rows.layout.content) + len(texts), seconds, cpu))


def run_gigatoken(source: Path, workers: int, folder: Path) -> Timing:
    """gigatoken alone: its tokens plus an end-of-text per article."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    texts = [text.encode() for text in read_texts(source, with_titles=True)]
    process = context.Process(target=encode_all, args=(texts, workers, rank_lines(load_tokenizer("gpt2")), results))
    process.start()
    return answers([process], results)[0]


def usual(source: Path, workers: int, folder: Path) -> None:
    """The usual script, in 20 lines."""
    import datasets

    encoding = tiktoken.get_encoding("r50k_base")

    def process(row):
        ids = encoding.encode_ordinary(f"{row['title']}\n\n{row['text']}")
        ids.append(encoding.eot_token)
        return {"ids": ids, "len": len(ids)}

    files = sorted(map(str, source.glob("*.parquet")))
    dataset = datasets.load_dataset("parquet", data_files=files, split="train", num_proc=workers)
    split = dataset.train_test_split(test_size=0.005, seed=1337, shuffle=True)
    tokenized = split.map(process, remove_columns=["id", "url", "title", "text"], num_proc=workers)
    for name, part in tokenized.items():
        total = np.sum(part["len"], dtype=np.uint64)
        out = np.memmap(folder / f"{name}.bin", dtype=np.uint16, mode="w+", shape=(int(total),))
        at, batches = 0, min(1024, len(part))
        for index in range(batches):
            batch = part.shard(num_shards=batches, index=index, contiguous=True).with_format("numpy")
            ids = np.concatenate(batch["ids"])
            out[at : at + len(ids)] = ids
            at += len(ids)
        out.flush()
    print(sum(os.path.getsize(folder / f"{name}.bin") for name in tokenized) // 2)


def run_usual(source: Path, workers: int, folder: Path) -> Timing:
    """`usual` in its own process, with empty caches."""
    command = [sys.executable, __file__, "--usual", folder, "--source", source, "--workers", workers]
    env = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    start, cpu = time.perf_counter(), cpu_seconds_of_children()
    result = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True)
    seconds, cpu = time.perf_counter() - start, cpu_seconds_of_children() - cpu
    if result.returncode:
        raise UserError(f"the usual way failed:\n{result.stderr}")
    return Timing(int(result.stdout.split()[-1]), seconds, cpu)


WAYS = {
    "ours": run_ours,
    "without": lambda source, workers, folder: run_ours(source, workers, folder, ("-c", WITHOUT_GIGATOKEN)),
    "gigatoken": run_gigatoken,
    "tiktoken": lambda source, workers, folder: run_alone("tiktoken", source, workers),
    "limit": lambda source, workers, folder: run_alone("limit", source, workers),
    "usual": run_usual,
}


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


@dataclass(frozen=True)
class Preparing:
    source: Path | None = None  # folder of .parquet; None: WIKIPEDIA_SAMPLE_DIR
    workers: int = 2
    repetitions: int = 3
    times: int = 1  # read the files of the source this many times
    ways: tuple[Literal[tuple(WAYS)], ...] = tuple(WAYS)
    scaling: bool = False  # measure memory and time at 1, 2 and 4 times the input instead
    usual: Path | None = None  # only run the usual script, which writes into this folder


def main() -> None:
    args = tyro.cli(Preparing, description=__doc__)
    folder = args.source or os.environ.get("WIKIPEDIA_SAMPLE_DIR")
    if not folder:
        raise UserError("--source: give a folder of .parquet files, or set WIKIPEDIA_SAMPLE_DIR")
    args = replace(args, source=Path(folder).resolve())
    if not list(args.source.glob("*.parquet")):
        raise UserError(f"--source {folder}: holds no .parquet files")
    if args.usual:
        usual(args.source, args.workers, args.usual)
        return

    if importlib.util.find_spec("gigatoken") is None:
        print("gigatoken is not installed (pip install -r requirements-fast.txt): left out, and `ours` is without it")
        args = replace(args, ways=tuple(way for way in args.ways if way not in ("gigatoken", "without")))
    print(f"{cpu_name()}, {os.cpu_count()} cores, {args.workers} workers, {time.strftime('%Y-%m-%d')}")
    with tempfile.TemporaryDirectory() as name:
        (measure_scaling if args.scaling else measure_speed)(args, Path(name))


def repeated(source: Path, times: int, folder: Path) -> Path:
    """A folder with `times` copies of each file of the source. If they were links, the command would read one."""
    copies = folder / f"in{times}"
    copies.mkdir()
    for copy in range(times):
        for path in sorted(source.glob("*.parquet")):
            shutil.copyfile(path, copies / f"{copy}-{path.name}")
    return copies


def measure_speed(args: Preparing, folder: Path) -> None:
    if args.times == 1:
        without_titles = run_alone("tiktoken", args.source, args.workers, with_titles=False)
        print(f"tokens of the texts without titles, with an end-of-text each: {without_titles.tokens:,}")
    source = repeated(args.source, args.times, folder)
    timings: dict[str, list[Timing]] = {way: [] for way in args.ways}
    for repetition in range(args.repetitions):
        for way in args.ways:
            out = folder / f"{way}{repetition}"
            out.mkdir()
            timing = WAYS[way](source, args.workers, out)
            timings[way].append(timing)
            print(
                f"{way:10}{timing.tokens:,} tokens in {timing.seconds:.2f} s, {timing.cpu_seconds:.2f} s of CPU",
                flush=True,
            )
    assert len({timing.tokens for several in timings.values() for timing in several}) == 1, timings
    for name, pick in (("median", statistics.median), ("best", min)):  # the best is the least disturbed by others
        print(
            f"\n{name:10}{'M tokens/s':>12}{args.ways[0] + ' / it':>14}{'M tokens/CPU s':>18}{args.ways[0] + ' / it':>14}"
        )
        rates = {
            way: (
                several[0].tokens / pick(t.seconds for t in several),
                several[0].tokens / pick(t.cpu_seconds for t in several),
            )
            for way, several in timings.items()
        }
        first, first_cpu = rates[args.ways[0]]
        for way, (rate, cpu_rate) in rates.items():
            print(f"{way:10}{rate / 1e6:12.2f}{first / rate:14.2f}{cpu_rate / 1e6:18.2f}{first_cpu / cpu_rate:14.2f}")


def measure_scaling(args: Preparing, folder: Path) -> None:
    print(f"{'input':>8}{'tokens':>14}{'seconds':>10}{'peak, MB':>12}")
    for times in (1, 2, 4):
        ours = run_ours(repeated(args.source, times, folder), args.workers, folder / f"out{times}")
        print(f"{times:>7}x{ours.tokens:>14,}{ours.seconds:>10.1f}{ours.peak_bytes / 1e6:>12.0f}", flush=True)


if __name__ == "__main__":
    run(main)
