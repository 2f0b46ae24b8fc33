"""The command line, made from the dataclasses of config.py."""

import contextlib
import dataclasses
import itertools
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_args, get_type_hints

import tyro

from config import (
    KINDS,
    PATH,
    PRESETS,
    ExportConfig,
    GenerateConfig,
    ModelConfig,
    PrepareConfig,
    Preset,
    Range,
    TrainConfig,
    flag_of,
    parts,
)
from internals.hints import hints
from internals.settings import with_settings_of
from internals.start import UserError, first_process_has_spoken

COMMANDS = {
    "prepare_data.py": PrepareConfig,
    "train.py": TrainConfig,
    "generate.py": GenerateConfig,
    "export.py": ExportConfig,
}

C = TypeVar("C")


numbers = tyro.constructors.ConstructorRegistry()


@numbers.primitive_rule
def number_or_word(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """A number, or the one word that may stand in its place: `auto`, `None`. tyro's own message names Python's types."""
    kinds = [kind for kind in parts(info.type) if not isinstance(kind, Range)]
    number = next((kind for kind in kinds if kind in (int, float)), None)
    meanings = [None if kind in (None, type(None)) else kind for kind in kinds if kind is not number]
    if number is None or len(meanings) > 1:
        return None
    words = {str(meaning): meaning for meaning in meanings}

    def parse(values: list[str]) -> int | float | str | None:
        for word, meaning in words.items():
            if values[0].lower() == word.lower():
                return meaning
        with contextlib.suppress(ValueError):
            return whole_number(values[0]) if number is int else float(values[0])
        example = "1000 or 1e3" if number is int else "0.5"
        others = "".join(f", nor {word}" for word in words)
        raise ValueError(f"{values[0]!r} is not {KINDS[number]}, such as {example}{others}")

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="|".join([number.__name__.upper(), *(f"{{{word}}}" for word in words)]),
        instance_from_str=parse,
        is_instance=lambda value: value in words.values() or isinstance(value, int | float),
        str_from_instance=lambda value: [str(value)],
    )


def whole_number(text: str) -> int:
    """`1e6` and `5.0` are whole numbers, too. `1.000` is 1 to Python and 1000 to many people, so it is none.

    Raises:
        ValueError: it is not a whole number.
    """
    if re.fullmatch(r"\d{1,3}(\.\d{3})+", text):
        raise ValueError
    with contextlib.suppress(ValueError):
        return int(text)
    if (number := float(text)).is_integer():
        return int(number)
    raise ValueError


def parse(cls: type[C], description: str, args: Sequence[str] | None = None, default: C | None = None) -> C:
    """The configuration `cls` from the command line. A wrong flag ends in a message on stderr and exit status 2.

    Args:
        args: the command line; None: this process's.
        default: the values of flags that are not given; None: those of the preset, or of `--config FILE`.
    """
    args = list(sys.argv[1:] if args is None else args)
    if default is None:
        preset = flag_value(args, "--preset", Preset.preset)  # for the defaults that --help shows; tyro checks the name
        default = with_preset(cls, preset if preset in PRESETS else Preset.preset)
        if isinstance(default, TrainConfig) and (file := flag_value(args, "--config", "")):
            default = with_settings_of(default, file)
    speaks = os.environ.get("LOCAL_RANK", "0") in ("0", "")  # process 0 of a machine speaks for all
    try:
        parsed = tyro.cli(
            cls,
            args=args,
            description=description,
            default=default,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.SuppressFixed),
            registry=numbers,
            console_outputs=speaks,
        )
    except SystemExit as end:
        if end.code and speaks:
            types = {f.name: f.type for one in (cls, ModelConfig) for f in dataclasses.fields(one)}
            switches = [flag_of(name) for name, kind in types.items() if kind is bool]
            for hint in hints(args, [*map(flag_of, types)], switches):
                print(hint, file=sys.stderr)
        first_process_has_spoken(30)  # when one process ends, torchrun ends all: process 0 must have printed by then
        raise
    paths = [name for name, kind in get_type_hints(cls, include_extras=True).items() if PATH in get_args(kind)]
    return dataclasses.replace(parsed, **{name: os.path.expanduser(getattr(parsed, name)) for name in paths})


def flag_value(args: Sequence[str], flag: str, default: str) -> str:
    """The value of the last `flag` among the arguments."""
    value = default
    for arg, following in itertools.zip_longest(args, args[1:]):
        if arg == flag:
            value = following or value
        elif arg.startswith(f"{flag}="):
            value = arg.removeprefix(f"{flag}=")
    return value


def is_given(flag: str) -> bool:
    """Whether the command line of this process has the flag. `--n_layer` is `--n-layer` to tyro, too."""
    return any(arg.partition("=")[0].replace("_", "-") == flag for arg in sys.argv[1:])


def utf8_argument(flag: str, text: str) -> str:
    """The value of a flag as UTF-8 text. Python decoded its bytes as the locale says, which may name another encoding.

    Raises:
        UserError: its bytes are not UTF-8, nor text in the locale's encoding.
    """
    with contextlib.suppress(UnicodeError):
        return os.fsencode(text).decode("utf-8")
    try:
        text.encode("utf-8")  # what the locale could not decode are lone surrogates, which UTF-8 does not have
    except UnicodeEncodeError as error:
        raise UserError(f"{flag}: not UTF-8 text; convert it first") from error
    return text


def with_preset(cls: Callable[..., C], preset: str) -> C:
    """The configuration `cls` with the values of a preset, defaults for the rest. Required fields stay required.

    Raises:
        UserError: somebody has edited a default or the preset, and it is wrong.
    """
    optional = {f.name for f in dataclasses.fields(cls) if f.default != tyro.MISSING}
    try:
        values = {name: value for name, value in preset_values(preset).items() if name in optional}
        if "model" in optional:
            values["model"] = with_preset(ModelConfig, preset)
        return cls(**values)
    except ValueError as error:
        new = (
            "; add a new preset's name to the type of Preset.preset, too" if str(error).startswith("--preset ") else ""
        )
        raise UserError(f"config.py: {error}{new}") from error


def preset_values(preset: str) -> dict[str, Any]:
    """The values that a preset sets: its entry in PRESETS, its name, and the folders that follow from its name.

    Raises:
        ValueError: a key of the entry is not a field of any command.
    """
    fields = {f.name for cls in (ModelConfig, *COMMANDS.values()) for f in dataclasses.fields(cls)}
    entry = PRESETS.get(preset, {})  # if config.py's default names no preset, the check of the fields says so
    if unknown := entry.keys() - fields:
        raise ValueError(f"PRESETS[{preset!r}]: there is no field {', '.join(sorted(unknown))}")
    out_dir = f"checkpoints/{preset}"
    folders = {"out_dir": out_dir, "checkpoint": f"{out_dir}/best.pt"}
    if preset == "wikipedia":  # config.py's defaults hold its folders
        folders = {}
    return {"preset": preset, **folders, **entry}
