"""How long a new run is, and the numbers that `auto` stands for, which follow from that."""

import dataclasses
import math
from typing import Any, NamedTuple

from config import ModelConfig, TrainConfig

# `--dropout auto`, by how often the run reads its text: from so many times on, this probability.
DROPOUT = {0: 0.0, 2: 0.1, 8: 0.2}


class Numbers(NamedTuple):
    cfg: TrainConfig
    chosen: tuple[str, ...]  # what was chosen and why, in words


def choose_numbers(cfg: TrainConfig, epoch_tokens: int) -> Numbers:
    """`cfg` with a number for each `auto` that depends on the length of the run, and with `max_iters` at most `max_epochs`.

    Args:
        epoch_tokens: that the run reads in one pass over the training split.
    """
    chosen = []
    most = most_iterations(cfg, epoch_tokens)
    if most < cfg.max_iters:
        cfg = dataclasses.replace(cfg, max_iters=most)
        chosen.append(f"{most:,} iterations (--max-epochs {cfg.max_epochs:g})")
    if cfg.eval_interval == "auto":
        cfg = dataclasses.replace(cfg, eval_interval=tenth(cfg.max_iters))
        chosen.append(f"an evaluation every {cfg.eval_interval:,} (a tenth of the run)")
    if cfg.model.dropout == "auto":
        epochs = cfg.max_iters * cfg.tokens_per_iter / epoch_tokens
        cfg = dataclasses.replace(cfg, model=with_dropout(cfg.model, epochs))
        chosen.append(f"dropout {cfg.model.dropout:g} (the text is read {epochs:.2g} times)")
    return Numbers(cfg, tuple(chosen))


def most_iterations(cfg: TrainConfig, epoch_tokens: int) -> int:
    """`max_iters`, or the iterations that `max_epochs` allows where these are fewer; at least 1."""
    if cfg.max_epochs is None:
        return cfg.max_iters
    return min(cfg.max_iters, max(1, math.floor(cfg.max_epochs * epoch_tokens / cfg.tokens_per_iter)))


def tenth(iterations: int) -> int:
    """A tenth of a run as a round number, at least 1: of 85 8, of 314 30, of 3,600 360, of 16,384 1,600."""
    number = max(1, iterations // 10)
    return round(number, -(len(str(number)) // 2))


def with_dropout(model: ModelConfig, epochs: float) -> ModelConfig:
    """`model` with a number for `--dropout auto`, where the text is read `epochs` times."""
    if model.dropout != "auto":
        return model
    return dataclasses.replace(model, dropout=max(p for least, p in DROPOUT.items() if epochs >= least))


def keep_numbers(cfg: TrainConfig, settings: dict[str, Any]) -> TrainConfig:
    """`cfg` with what a run that is resumed has for each `auto`. `settings` are that run's."""
    if cfg.eval_interval == "auto":
        cfg = dataclasses.replace(cfg, eval_interval=settings["eval_interval"])
    if cfg.model.dropout == "auto":
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, dropout=settings["model"]["dropout"]))
    return cfg
