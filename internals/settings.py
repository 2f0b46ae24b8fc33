"""The settings of a run as plain data: read from a config.json or a checkpoint, compared, put into today's fields."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from config import NOT_SETTINGS, TrainConfig
from internals.shell import shell_join
from internals.start import UserError, first_line


def differences(then: dict[str, Any], now: dict[str, Any], defaults: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that changed: `{"max_iters": (600, 1200)}`. One that `then` lacks did not exist yet, and counts as its default.

    A number in place of `auto` is not a change: a run stores the number that `auto` stood for.
    """
    changed = {}
    for name, new in now.items():
        old = then.get(name, defaults[name])
        if isinstance(new, dict):
            changed |= differences(old, new, defaults[name])
        elif old != new and not stands_for_auto(old, new):
            changed[name] = (old, new)
    return changed


def stands_for_auto(old: Any, new: Any) -> bool:
    """Whether one is `auto` and the other a number that it may stand for."""
    return "auto" in (old, new) and any(isinstance(value, int | float) for value in (old, new))


def as_typed(value: Any) -> str:
    """A setting as you would type it in a command. A number keeps all its digits."""
    return shell_join([str(value).removesuffix(".0") if isinstance(value, float) else str(value)])


def with_settings(cfg: TrainConfig, settings: dict[str, Any]) -> TrainConfig:
    """`cfg` with the settings of a run, but its own folders and modes. Settings that are newer than the run stay as in
    `cfg`. Raises TypeError or ValueError if `settings` are not those of a run."""
    settings = upgrade(settings)
    model = dataclasses.replace(cfg.model, **settings["model"])
    taken = {name: value for name, value in settings.items() if name not in (*NOT_SETTINGS, "model")}
    cfg = dataclasses.replace(cfg, **taken, model=model)
    if math.isclose(cfg.final_lr, cfg.learning_rate / 10):
        cfg = dataclasses.replace(cfg, min_lr=None)  # so that it follows a changed learning rate
    return cfg


def upgrade(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run in today's fields. Where an older run had no choice, what it did is filled in: a preset may
    choose something else today."""
    old = {"optimizer": "adamw", "muon_momentum": 0.95, **settings}
    if "muon_learning_rate" in old:
        old["muon_lr_scale"] = old.pop("muon_learning_rate") / old["learning_rate"]
    return old


def with_settings_of(cfg: TrainConfig, file: str) -> TrainConfig:
    """`with_settings` for the settings in `file`, a config.json that a run wrote."""
    try:
        return with_settings(cfg, json.loads(Path(os.path.expanduser(file)).read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise UserError(f"--config {file}: there is no such file; give the config.json of a run") from error
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise UserError(f"--config {file}: not the config.json of a run ({first_line(error)})") from error
