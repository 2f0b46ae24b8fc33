"""Commands to paste into a shell."""

import os
import re
import shlex
import subprocess
from collections.abc import Iterable


def shell_join(words: Iterable[str]) -> str:
    """The words of a command in one line, quoted for the shell of this system.

    On Windows that is cmd.exe or PowerShell. cmd.exe does not know single quotes, and neither shell needs quotes around
    a backslash. A word with any other special character gets double quotes.
    """
    return " ".join(map(windows_quoted, words)) if os.name == "nt" else shlex.join(words)


def windows_quoted(word: str) -> str:
    """`windows_quoted("a&b") -> '"a&b"'`"""
    if re.fullmatch(r"[\w./:\\=-]+", word):
        return word
    return '"' + subprocess.list2cmdline([f" {word}"])[2:]  # which adds quotes only because of the blank
