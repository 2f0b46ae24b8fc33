"""Commands to paste into a shell."""

import os
import shlex
import subprocess
from collections.abc import Iterable


def shell_join(words: Iterable[str]) -> str:
    """The words of a command in one line, quoted for the shell of this system.

    On Windows that is cmd.exe or PowerShell: single quotes are no quotes in the first one, and a backslash needs none.
    """
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)
