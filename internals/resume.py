"""The settings of a command about a run that exists: those of its checkpoint, changed by the flags that were given."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from config import NOT_SETTINGS, PRESETS, TrainConfig, flag_of
from internals import checkpoint
from internals.cli import is_given, parse, with_preset
from internals.run_folder import check_folder
from internals.settings import as_typed, differences, with_settings, with_settings_of
from internals.start import UserError


class Resumed(NamedTuple):
    cfg: TrainConfig
    kept: list[str]  # notes to print about settings that last.pt decided


def resume_settings(cfg: TrainConfig, args: Sequence[str] | None = None) -> Resumed:
    """The settings of a command that resumes: those of last.pt, changed by the flags that were given. `--eval-only` takes
    the text of best.pt. Any other command keeps its own.

    Args:
        cfg: the parsed command.
        args: its command line; None: this process's.
    """
    if cfg.eval_only:
        return Resumed(with_text_of_best(cfg), [])
    last = Path(cfg.out_dir, "last.pt")
    if not (cfg.resume or cfg.auto_resume) or not last.exists():
        return Resumed(cfg, [])
    if cfg.resume and cfg.config:
        raise UserError("--config: only for a new run; change a resumed run with flags")
    saved = checkpoint.load_last(last, mmap=True)["config"]
    preset = saved["preset"] if saved.get("preset") in PRESETS else cfg.preset
    data_dir = saved.get("data_dir", cfg.data_dir)
    usual = with_preset(TrainConfig, preset)
    # What sets a new run's max_iters does not set that of a resumed one, unless a flag asks for it
    defaults = dataclasses.replace(usual, max_minutes=None, max_epochs=None, out_dir=cfg.out_dir, data_dir=data_dir)
    with checkpoint.fitting(f"{last}: its settings are not those of this version"):
        then = with_settings(defaults, saved)
    if cfg.config:  # --auto-resume, in whose command it stays
        defaults = with_settings_of(defaults, cfg.config)
    resumed, fresh = (parse(TrainConfig, "", args, default=default) for default in (then, defaults))
    if cfg.resume and (given := [name for name in ("max_minutes", "max_epochs") if getattr(resumed, name)]):
        raise UserError(
            f"{flag_of(given[0])}: is only for a new run. The one in {cfg.out_dir} has {then.max_iters:,} "
            "iterations; change that with --max-iters"
        )
    if cfg.auto_resume:  # the same command began the run, so its --max-iters means what it meant then
        max_iters = then.max_iters if cfg.max_minutes else resumed.max_iters
        resumed = dataclasses.replace(resumed, max_iters=max_iters, max_minutes=None, max_epochs=cfg.max_epochs)
    changed = differences(*(dataclasses.asdict(settings) for settings in (resumed, fresh, fresh)))
    silent = {*NOT_SETTINGS, "vocab_size", *(vars(resumed.model) if resumed.init_from else ())}
    if usual.max_epochs or cfg.max_minutes or cfg.max_epochs:  # max_iters follows from them
        silent.add("max_iters")
    kept = [
        f"kept from last.pt: {name} {as_typed(old)} ({cfg.config or 'config.py'}: {as_typed(new)}); "
        + (
            "a different value needs another --out-dir"
            if name in (*vars(resumed.model), "optimizer", "init_from")
            else f"{flag_of(name)} {as_typed(new)} changes it"
        )
        for name, (old, new) in changed.items()
        if name not in silent
    ]
    return Resumed(resumed, kept)


def with_text_of_best(cfg: TrainConfig) -> TrainConfig:
    """`cfg` with the data folder and the validation tokens on which the loss of best.pt was measured, unless a flag or a
    file chooses others. Another text with the same tokenizer would give a loss that says nothing about the run."""
    if cfg.init_from or cfg.config:
        return cfg
    check_folder(Path(cfg.out_dir))
    best = Path(cfg.out_dir, "best.pt")
    saved = checkpoint.load(best, mmap=True)["config"]
    names = [name for name in ("data_dir", "eval_tokens") if name in saved and not is_given(flag_of(name))]
    if "data_dir" in names and not os.path.isdir(saved["data_dir"]):
        raise UserError(
            f"--eval-only: {best} was evaluated with --data-dir {saved['data_dir']}, and there is no such folder "
            f"({os.path.abspath(saved['data_dir'])}); give the path to that folder, or prepare it again if it is gone"
        )
    return dataclasses.replace(cfg, **{name: saved[name] for name in names})
