"""What somebody may have meant whose command line was refused."""

import itertools
import re
from collections.abc import Collection, Iterator, Sequence

# Flags of nanoGPT, whose users try them here, and of the other commands
HABITS = {
    "--always-save-checkpoint": "not needed: last.pt is always saved",
    "--checkpoint": "--out-dir, or --init-from",
    "--dataset": "--data-dir",
    "--decay-lr": "--min-lr; the same as --learning-rate, it keeps that constant",
    "--eval-iters": "--eval-tokens",
    "--gradient-accumulation-steps": "--tokens-per-iter, the tokens of all micro-steps together",
    "--init-from": "--checkpoint",
    "--lr-decay-iters": "--max-iters, where the cosine always ends",
    "--out-dir": "--checkpoint",
    "--start": "--prompt; for a file, --prompt - < FILE",
    "--wandb-log": "--tracker wandb",
}
# A hyphen, dash or minus sign from a web page or a word processor, or a single hyphen before a word
NOT_TWO_HYPHENS = re.compile("[\u2010-\u2015\u2212]|-[A-Za-z]{2}")
LIKE_A_FLAG = re.compile(r"-(?![\d.])")  # a negative number is taken as a value
TRUTH = ("true", "false", "yes", "no", "on", "off", "0", "1")


def hints(args: Sequence[str], flags: Collection[str], switches: Collection[str]) -> Iterator[str]:
    """A line for each argument that looks like a common mistake.

    Args:
        flags: all flags of the command.
        switches: those that take no value.
    """
    before = ""
    for arg, following in itertools.zip_longest(args, args[1:], fillvalue=""):
        name, _, value = arg.partition("=")
        flag = name.replace("_", "-")
        if before in flags and before not in switches and LIKE_A_FLAG.match(arg) and flag not in flags:
            yield f"hint: a value that begins with a hyphen needs an equals sign: {before}={arg}"
        elif NOT_TWO_HYPHENS.match(arg):
            yield f"hint: {arg}: a flag begins with two plain hyphens: --{arg.lstrip('-‐‑‒–—―−')}"
        elif flag in switches and (value or following).lower() in TRUTH:
            yield f"hint: {flag} takes no value: give it alone, or leave it out"
        elif flag in HABITS and flag not in flags:
            yield f"hint: {flag} is called otherwise here: {HABITS[flag]}"
        before = flag if not value else ""
