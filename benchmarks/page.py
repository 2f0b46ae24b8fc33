"""The cost of run.html: seconds per evaluation and bytes on the disk, for an untrained model of a preset's shape.

    python benchmarks/page.py                              the default model, 30 evaluations
    python benchmarks/page.py --preset demo --evaluations 7

Each evaluation measures the passage, adds the row and writes both files, as in training. Writing the sample text is not
counted: an evaluation does that even without a page. An untrained model's surprises are the most expensive to write.
"""

import contextlib
import io
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import common

from internals import start  # isort: skip

if __name__ == "__main__":
    start.begin()  # sets how long waiting threads spin, before PyTorch is imported

import numpy as np
import tiktoken
import tyro

import prepare_data
from config import PRESETS, PrepareConfig, TrainConfig
from internals import report, samples
from internals.cli import with_preset
from internals.machine import make_machine
from internals.run import Run, TrainState
from internals.run_length import resolve_auto
from internals.shards import read_meta, read_tokenizer
from internals.tokenizer import load_tokenizer
from internals.windows import TokenStream, TrainingWindows, ValidationWindows
from model import GPT


@dataclass(frozen=True)
class Page:
    preset: Literal[tuple(PRESETS)] = "wikipedia"
    evaluations: int = 30


def preset_tokenizer(preset: str) -> tiktoken.Encoding:
    """The tokenizer of the preset's data; trained on the embedded sample where the preset trains one."""
    cfg = with_preset(PrepareConfig, preset)
    if cfg.tokenizer != "train":
        return load_tokenizer(cfg.tokenizer)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        prepare_data.prepare(replace(cfg, source=(("sample",),), data_dir=folder))
        return load_tokenizer(read_tokenizer(folder, read_meta(folder)))


def main(args: Page) -> None:
    tokenizer = preset_tokenizer(args.preset)
    with open(common.REPO / "sample/articles.jsonl", encoding="utf-8") as file:
        text = "\n\n".join(json.loads(line)["text"] for line, _ in zip(file, range(20), strict=False))
    tokens = tokenizer.encode_ordinary(text)
    with tempfile.TemporaryDirectory() as folder:
        cfg = replace(with_preset(TrainConfig, args.preset), out_dir=folder)
        cfg = replace(cfg, model=replace(cfg.model, vocab_size=tokenizer.n_vocab))
        cfg = resolve_auto(cfg, epoch_tokens=10**9).cfg
        split = {"tokens": len(tokens), "bytes": len(text.encode()), "articles": 1, "shards": []}
        meta = {"tokenizer": "-", "source": {}, "splits": {"train": split, "val": split}}
        machine, model = make_machine(cfg), GPT(cfg.model)
        stream = TokenStream([np.array(tokens, np.uint16)])
        windows = ValidationWindows(stream, cfg.model.block_size, cfg.eval_tokens)
        run = Run(cfg, meta, machine, TrainingWindows(stream, cfg.model.block_size, cfg.seed), windows)
        state = TrainState(model.to(machine.device), None, None)
        log = report.RunLog(run, state)
        log.begin()
        passages, pages = [], []
        for _ in range(args.evaluations):
            log.last = {"train_loss": 5.0, "learning_rate": 1e-3, "grad_norm": 1.0}
            for _ in range(cfg.eval_interval // cfg.log_interval):
                state.iter, state.seconds, state.val_loss = state.iter + cfg.log_interval, state.seconds + 1.0, 5.0
                log.write_row(evaluated=False)
            log.metrics.rows[-1].update(report.validation_row(5.0, meta))
            begin = time.perf_counter()
            log.samples.add(samples.sample_row(run, state, tokenizer, text[:250]))
            log.samples.flush()
            passages.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            log._write_page(running=True)
            pages.append(time.perf_counter() - begin)
        sizes = {name: (Path(folder) / name).stat().st_size for name in ("run.html", "samples.jsonl")}
    print(
        f"{args.preset}, {args.evaluations} evaluations, {machine.name}: passage and row {statistics.median(passages):.3f} s "
        f"(median; worst {max(passages):.3f}), page {statistics.median(pages):.3f} s (the last {pages[-1]:.3f}); "
        + ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in sizes.items())
    )


if __name__ == "__main__":
    start.run(lambda: main(tyro.cli(Page, description=__doc__)))
