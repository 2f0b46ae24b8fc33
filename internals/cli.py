"""The command line, made from the dataclasses of config.py."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from config import PRESETS, ModelConfig

C = TypeVar("C")


def with_preset(cls: Callable[..., C], preset: str) -> C:
    """The configuration `cls` as the preset has it: its defaults, and over them what PRESETS names among its fields.
    A field that has no default is the user's alone to give: no preset sets it."""
    values = {
        f.name: PRESETS[preset][f.name]
        for f in dataclasses.fields(cls)
        if f.name in PRESETS[preset] and f.default is not tyro.MISSING
    }
    for f in dataclasses.fields(cls):
        if f.name == "model":
            values["model"] = with_preset(ModelConfig, preset)
        elif f.name == "preset":
            values["preset"] = preset
    return cls(**values)


def parse(cls: Callable[..., C], description: str, args: Sequence[str] | None = None) -> C:
    """A configuration from the command line. A wrong flag or value ends in a message on stderr and exit status 2."""
    args = list(sys.argv[1:] if args is None else args)
    # The preset decides the defaults that --help shows, so it is looked for first; tyro judges it with all the rest.
    preset = "wikipedia"
    for i, arg in enumerate(args):
        if arg == "--preset":
            preset = args[i + 1] if i + 1 < len(args) else preset
        elif arg.startswith("--preset="):
            preset = arg.removeprefix("--preset=")
    return tyro.cli(
        cls,
        args=args,
        description=description,
        default=with_preset(cls, preset if preset in PRESETS else "wikipedia"),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.SuppressFixed),
    )
