"""How long a new run is, and the numbers that `auto` stands for. They follow from the length and from the text."""

import dataclasses
import math
from typing import Any, NamedTuple

from config import ModelConfig, TrainConfig

# --dropout auto: {least passes over the text: probability}
DROPOUT = {0: 0.0, 2: 0.1, 8: 0.2}
# --n-embd auto: {least tokens of training text: width}. Only 93,000 and 45 million tokens were tried
# (docs/experiments.md), so the threshold is a guess
WIDTH = {0: 128, 500_000: 256}
# --tokens-per-iter auto: {least tokens of training text: tokens}. A guess, too; a small text gets more iterations
ITERATION = {0: 2_048, 500_000: 8_192}


class Resolved(NamedTuple):
    cfg: TrainConfig
    chosen: tuple[str, ...]  # what was chosen and why, in words


def resolve_auto(cfg: TrainConfig, epoch_tokens: int, processes: int = 1) -> Resolved:
    """`cfg` with a number for each `auto` that depends on the text or the run, and with `max_iters` at most `max_epochs`.

    Args:
        epoch_tokens: tokens that one pass over the training split reads.
    """
    chosen = []
    if cfg.tokens_per_iter == "auto":
        cfg = dataclasses.replace(cfg, tokens_per_iter=iteration_tokens(cfg, epoch_tokens, processes))
        chosen.append(f"{cfg.tokens_per_iter:,} tokens an iteration")
    most = most_iterations(cfg, epoch_tokens)
    if most < cfg.max_iters:
        cfg = dataclasses.replace(cfg, max_iters=most)
        chosen.append(f"{most:,} iterations (--max-epochs {cfg.max_epochs:g})")
    if cfg.eval_interval == "auto":
        cfg = dataclasses.replace(cfg, eval_interval=tenth(cfg.max_iters))
        chosen.append(f"an evaluation every {cfg.eval_interval:,} (a tenth of the run)")
    epochs = cfg.max_iters * cfg.tokens_per_iter / epoch_tokens
    model = resolve_model(cfg.model, epoch_tokens, epochs)
    if "auto" in (cfg.model.n_embd, cfg.model.n_inner):
        chosen.append(f"{model.n_embd} dimensions, {model.n_inner:,} in the feed-forward layers")
    if cfg.model.dropout == "auto":
        chosen.append(f"dropout {model.dropout:g} (the text is read {epochs:.2g} times)")
    return Resolved(dataclasses.replace(cfg, model=model), tuple(chosen))


def iteration_tokens(cfg: TrainConfig, epoch_tokens: int, processes: int) -> int:
    """`tokens_per_iter`, or the number that its `auto` stands for: whole sequences for every process, at least one."""
    if cfg.tokens_per_iter != "auto":
        return cfg.tokens_per_iter
    unit = cfg.model.block_size * processes
    return max(1, max(n for least, n in ITERATION.items() if epoch_tokens >= least) // unit) * unit


def most_iterations(cfg: TrainConfig, epoch_tokens: int) -> int:
    """`max_iters`, or the iterations that `max_epochs` allows where these are fewer; at least 1. `tokens_per_iter` is a
    number."""
    if cfg.max_epochs is None:
        return cfg.max_iters
    return max(1, math.floor(min(cfg.max_iters, cfg.max_epochs * epoch_tokens / cfg.tokens_per_iter)))


def tenth(iterations: int) -> int:
    """A tenth of a run as a round number, at least 1: `tenth(85) -> 8`, `tenth(314) -> 30`, `tenth(3_600) -> 360`."""
    number = max(1, iterations // 10)
    return round(number, -(len(str(number)) // 2))


def resolve_model(model: ModelConfig, epoch_tokens: float, epochs: float) -> ModelConfig:
    """`model` with a number for each `auto`, where a text of `epoch_tokens` tokens is read `epochs` times."""
    n_embd, n_inner, dropout = model.n_embd, model.n_inner, model.dropout
    if n_embd == "auto":
        width = max(size for least, size in WIDTH.items() if epoch_tokens >= least)
        n_embd = math.ceil(width / model.n_head) * model.n_head
    if n_inner == "auto":
        n_inner = 4 * n_embd
    if dropout == "auto":
        dropout = max(p for least, p in DROPOUT.items() if epochs >= least)
    return dataclasses.replace(model, n_embd=n_embd, n_inner=n_inner, dropout=dropout)


def resolve_as_before(cfg: TrainConfig, settings: dict[str, Any]) -> TrainConfig:
    """`cfg` with what a run that is resumed has for each `auto`. `settings` are that run's.

    Only `--resume --batch-size auto` stays: it asks for a new number, for another GPU, say.
    """
    names = ["eval_interval", "tokens_per_iter", *(["batch_size"] if cfg.auto_resume else [])]
    taken = {name: settings[name] for name in names if getattr(cfg, name) == "auto"}
    model = {name: settings["model"][name] for name, value in vars(cfg.model).items() if value == "auto"}
    return dataclasses.replace(cfg, **taken, model=dataclasses.replace(cfg.model, **model))
