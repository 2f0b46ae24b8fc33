"""How a command ends: a foreseen problem in one line on stderr and exit status 2, a bug in a traceback."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A foreseen problem (a mistake, a disk, a network, damaged data): its text says in one line what to do."""


def run(main: Callable[[], None]) -> None:
    """Run a command: a foreseen problem ends in one line on stderr and exit status 2. Only a bug shows a traceback."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # as shells have it for a program that Ctrl-C stopped
