"""The command line, made from the dataclasses of config.py."""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from config import PRESETS, ModelConfig

C = TypeVar("C")


def parse(cls: Callable[..., C], description: str, args: Sequence[str] | None = None) -> C:
    """The configuration `cls` from the command line. A wrong flag ends in a message on stderr and exit status 2."""
    args = list(sys.argv[1:] if args is None else args)
    preset = named_preset(args)  # its values are the defaults that --help shows; tyro checks the name itself
    return tyro.cli(
        cls,
        args=args,
        description=description,
        default=with_preset(cls, preset if preset in PRESETS else "wikipedia"),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.SuppressFixed),
    )


def named_preset(args: Sequence[str]) -> str:
    """The value of the last `--preset` among the arguments."""
    preset = "wikipedia"
    for arg, following in itertools.zip_longest(args, args[1:]):
        if arg == "--preset":
            preset = following or preset
        elif arg.startswith("--preset="):
            preset = arg.removeprefix("--preset=")
    return preset


def with_preset(cls: Callable[..., C], preset: str) -> C:
    """The configuration `cls` with the values of a preset, defaults for the rest. A field without a default stays so."""
    given = {f.name: f.default for f in dataclasses.fields(cls)}
    values = {
        name: value for name, value in preset_values(preset).items() if given.get(name, tyro.MISSING) != tyro.MISSING
    }
    if "model" in given:
        values["model"] = with_preset(ModelConfig, preset)
    return cls(**values)


def preset_values(preset: str) -> dict[str, Any]:
    """What a preset sets: its entry in PRESETS, its name, and the folders that follow from its name."""
    if preset == "wikipedia":  # the defaults of config.py, folders included
        return {"preset": preset}
    out_dir = f"checkpoints/{preset}"
    return {"preset": preset, "out_dir": out_dir, "checkpoint": f"{out_dir}/best.pt", **PRESETS[preset]}
