"""How fast prepare_data.py is, against the tokenizer alone and against the usual way, and what memory it takes.

    TIKTOKEN_CACHE_DIR=... WIKIPEDIA_SAMPLE_DIR=FOLDER_OF_PARQUET_FILES python benchmarks/prepare.py

    ours     the whole command `prepare_data.py --source FOLDER`, from the start of Python to its end
    tiktoken nothing but tiktoken, as it comes, on the same articles, already in memory, in as many processes
    limit    the same with the pattern of data.py, which cuts alike and is faster
    usual    load_dataset, Dataset.map(num_proc), np.memmap: as nanoGPT's prepare.py and its descendants do

The start of Python is counted in `ours` and `usual` (which `--times 4` makes a small part) and not in the other two.
All are timed in turns; the tables show the medians and the best of the repetitions, and their ratios.
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
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import tiktoken

WAYS = ("ours", "tiktoken", "limit", "usual")
REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
from internals.shards import read_meta  # noqa: E402
from internals.tokenizer import load_tokenizer  # noqa: E402


def ours(source: Path, workers: int, folder: Path) -> tuple[int, float, int]:
    """(tokens, seconds, peak resident bytes)"""
    command = [sys.executable, "prepare_data.py", "--source", source, "--data-dir", folder, "--workers", str(workers)]
    began = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), cwd=REPO, stdout=subprocess.DEVNULL)
    peaks = [0]
    watch = threading.Thread(target=watch_memory, args=(process, peaks))
    watch.start()
    status = process.wait()
    seconds = time.perf_counter() - began
    watch.join()
    assert status == 0, f"prepare_data.py ended with {status}"
    return sum(split["tokens"] for split in read_meta(folder)["splits"].values()), seconds, max(peaks)


def watch_memory(process: subprocess.Popen, peaks: list[int]) -> None:
    """The kernel's own peak (VmHWM), asked for while the process lives; on Linux alone."""
    while process.poll() is None:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    peaks.append(1024 * int(line.split()[1]))
        time.sleep(0.1)


def read_articles(source: Path, share: int, shares: int) -> list[tuple[str, str]]:
    rows = []
    for path in sorted(source.glob("*.parquet")):
        table = pq.read_table(path, columns=["title", "text"])
        rows += zip(table["title"].to_pylist(), table["text"].to_pylist(), strict=True)
    return rows[share::shares]


def tokenizer_alone(source: Path, share: int, shares: int, way: str, with_titles: bool, barrier, results) -> None:
    encoding = load_tokenizer("gpt2") if way == "limit" else tiktoken.get_encoding("r50k_base")  # gpt2's, in one file
    articles = [f"{title}\n\n{text}" if with_titles else text for title, text in read_articles(source, share, shares)]
    barrier.wait()
    began = time.perf_counter()
    tokens = sum(len(encoding.encode_to_numpy(text, disallowed_special=())) + 1 for text in articles)
    results.put((tokens, time.perf_counter() - began))


def alone(source: Path, workers: int, way: str, with_titles: bool = True) -> tuple[int, float]:
    """(tokens with an end-of-text each, seconds of the slowest process)"""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(workers), context.Queue()
    processes = [
        context.Process(target=tokenizer_alone, args=(source, n, workers, way, with_titles, barrier, results))
        for n in range(workers)
    ]
    for process in processes:
        process.start()
    got = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return sum(tokens for tokens, _ in got), max(seconds for _, seconds in got)


def usual(source: Path, workers: int, folder: Path) -> None:
    """The script of the usual way, in 20 lines."""
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


def run_usual(source: Path, workers: int, folder: Path) -> tuple[int, float]:
    """(tokens, seconds), as a command of its own, with empty caches."""
    command = [sys.executable, __file__, "--usual", folder, "--source", source, "--workers", workers]
    env = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    result = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    assert result.returncode == 0, result.stderr
    return int(result.stdout.split()[-1]), seconds


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
    parser.add_argument("--times", type=int, default=1, help="so many times the source's files, one after another")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--scaling", action="store_true", help="instead: memory and time at 1, 2 and 4 times the input")
    parser.add_argument("--usual", type=Path, help=argparse.SUPPRESS)  # the folder in which the usual way works
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
    """A folder in which the source's files are there so many times."""
    links = folder / f"in{times}"
    links.mkdir()
    for copy in range(times):
        for path in sorted(source.glob("*.parquet")):
            (links / f"{copy}-{path.name}").symlink_to(path)
    return links


def measure_speed(args: argparse.Namespace, folder: Path) -> None:
    if args.times == 1:
        tokens_of_texts, _ = alone(args.source, args.workers, "tiktoken", with_titles=False)
        print(f"tokens of the texts alone, with an end-of-text each: {tokens_of_texts:,}")
    source = repeated(args.source, args.times, folder)
    seconds: dict[str, list[float]] = {way: [] for way in args.ways}
    tokens: dict[str, int] = {}
    for repetition in range(args.repetitions):
        for way in seconds:
            out = folder / f"{way}{repetition}"
            out.mkdir()
            if way == "ours":
                tokens[way], took, _ = ours(source, args.workers, out)
            elif way == "usual":
                tokens[way], took = run_usual(source, args.workers, out)
            else:
                tokens[way], took = alone(source, args.workers, way)
            seconds[way].append(took)
            print(f"{way:8} {tokens[way]:,} tokens in {took:.2f} s", flush=True)
    assert len(set(tokens.values())) == 1, tokens
    for name, pick in (("median", statistics.median), ("best", min)):  # the best is the least disturbed by others
        rates = {way: tokens[way] / pick(times) for way, times in seconds.items()}
        print(f"\n{name:8}{'M tokens/s':>12}{args.ways[0] + ' / it':>12}")
        for way, rate in rates.items():
            print(f"{way:8}{rate / 1e6:12.2f}{rates[args.ways[0]] / rate:12.2f}")


def measure_scaling(args: argparse.Namespace, folder: Path) -> None:
    print(f"{'input':>8}{'tokens':>14}{'seconds':>10}{'peak, MB':>12}")
    for times in (1, 2, 4):
        source = repeated(args.source, times, folder)
        tokens, seconds, peak = ours(source, args.workers, folder / f"out{times}")
        print(f"{times:>7}x{tokens:>14,}{seconds:>10.1f}{peak / 1e6:>12.0f}", flush=True)


if __name__ == "__main__":
    main()
