"""How fast prepare_data.py is and how much memory it takes, next to tiktoken alone and to the usual way.

    TIKTOKEN_CACHE_DIR=... WIKIPEDIA_SAMPLE_DIR=FOLDER_OF_PARQUET_FILES python benchmarks/prepare.py

    ours     the whole command `prepare_data.py --source FOLDER`, from the start of Python to its end
    tiktoken tiktoken alone, as it comes, on the same articles, already in memory, in as many processes
    limit    the same with the pattern of internals/tokenizer.py, which cuts alike and is faster
    usual    load_dataset, Dataset.map(num_proc), np.memmap, like nanoGPT's prepare.py and its descendants

`ours` and `usual` include the start of Python, the other two do not. `--times 4` makes that a small part. All are timed
in turns. The tables show medians and bests of the repetitions, and their ratios.
"""

import argparse
import contextlib
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import tiktoken

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
from internals.shards import read_meta  # noqa: E402
from internals.tokenizer import load_tokenizer  # noqa: E402


@dataclass(frozen=True)
class Timing:
    tokens: int
    seconds: float
    peak_bytes: int = 0  # resident


def run_ours(source: Path, workers: int, folder: Path) -> Timing:
    command = [sys.executable, "prepare_data.py", "--source", source, "--data-dir", folder, "--workers", workers]
    start = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), cwd=REPO, stdout=subprocess.DEVNULL)
    peaks = [0]
    watch = threading.Thread(target=watch_memory, args=(process, peaks))
    watch.start()
    status = process.wait()
    seconds = time.perf_counter() - start
    watch.join()
    assert status == 0, f"prepare_data.py ended with {status}"
    return Timing(sum(split["tokens"] for split in read_meta(folder)["splits"].values()), seconds, max(peaks))


def watch_memory(process: subprocess.Popen, peaks: list[int]) -> None:
    """Append the kernel's own peak (VmHWM) in bytes while the process lives. Works on Linux only."""
    while process.poll() is None:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    peaks.append(1024 * int(line.split()[1]))
        time.sleep(0.1)


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
    start = time.perf_counter()
    tokens = sum(len(encoding.encode_to_numpy(text, disallowed_special=())) + 1 for text in texts)
    results.put(Timing(tokens, time.perf_counter() - start))


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
    timings = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return Timing(sum(timing.tokens for timing in timings), max(timing.seconds for timing in timings))


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
    """`usual` in a process of its own, with empty caches."""
    command = [sys.executable, __file__, "--usual", folder, "--source", source, "--workers", workers]
    env = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    result = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    assert result.returncode == 0, result.stderr
    return Timing(int(result.stdout.split()[-1]), seconds)


WAYS = {
    "ours": run_ours,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", type=Path, default=os.environ.get("WIKIPEDIA_SAMPLE_DIR"), help="folder of .parquet"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--times", type=int, default=1, help="read the files of the source this many times")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument(
        "--scaling", action="store_true", help="measure memory and time at 1, 2 and 4 times the input instead"
    )
    parser.add_argument("--usual", type=Path, help=argparse.SUPPRESS)  # the folder where `usual` writes
    args = parser.parse_args()
    if args.source is None:
        parser.error("give --source, or set WIKIPEDIA_SAMPLE_DIR")
    args.source = args.source.resolve()
    if args.usual:
        usual(args.source, args.workers, args.usual)
        return

    print(f"{cpu_name()}, {os.cpu_count()} cores, {args.workers} workers, {time.strftime('%Y-%m-%d')}")
    with tempfile.TemporaryDirectory() as name:
        (measure_scaling if args.scaling else measure_speed)(args, Path(name))


def repeated(source: Path, times: int, folder: Path) -> Path:
    """A folder with `times` links to each file of the source."""
    links = folder / f"in{times}"
    links.mkdir()
    for copy in range(times):
        for path in sorted(source.glob("*.parquet")):
            (links / f"{copy}-{path.name}").symlink_to(path)
    return links


def measure_speed(args: argparse.Namespace, folder: Path) -> None:
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
            print(f"{way:8} {timing.tokens:,} tokens in {timing.seconds:.2f} s", flush=True)
    assert len({timing.tokens for several in timings.values() for timing in several}) == 1, timings
    for name, pick in (("median", statistics.median), ("best", min)):  # the best is the least disturbed by others
        rates = {way: several[0].tokens / pick(t.seconds for t in several) for way, several in timings.items()}
        print(f"\n{name:8}{'M tokens/s':>12}{args.ways[0] + ' / it':>12}")
        for way, rate in rates.items():
            print(f"{way:8}{rate / 1e6:12.2f}{rates[args.ways[0]] / rate:12.2f}")


def measure_scaling(args: argparse.Namespace, folder: Path) -> None:
    print(f"{'input':>8}{'tokens':>14}{'seconds':>10}{'peak, MB':>12}")
    for times in (1, 2, 4):
        ours = run_ours(repeated(args.source, times, folder), args.workers, folder / f"out{times}")
        print(f"{times:>7}x{ours.tokens:>14,}{ours.seconds:>10.1f}{ours.peak_bytes / 1e6:>12.0f}", flush=True)


if __name__ == "__main__":
    main()
