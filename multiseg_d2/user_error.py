"""Errors that the user can mend, and how scripts tell them. Standard library only."""

from __future__ import annotations

import sys
from collections.abc import Callable

from .compat import MissingDependencyError

__all__ = ["EXIT_USER_ERROR", "ConfigError", "UserError", "run_script"]

#: Exit code of a script that cannot do what is asked for.
EXIT_USER_ERROR = 2


class UserError(Exception):
    """Base of the errors whose message says all that there is to say: which file, key or value, and what to do.

    Where the package is used from Python they are raised like any other; on the command line they need no traceback.
    """


class ConfigError(UserError, ValueError):
    """A config file or a command-line override says something that cannot be meant."""


def run_script(main: Callable[[], int | None], name: str = "") -> int:
    """Runs the ``main`` of a script.

    Args:
        main: returns an exit code, or None for 0.
        name: of this process where there are several.

    Returns:
        The exit code; :data:`EXIT_USER_ERROR` after a :class:`UserError`, a dependency that is not installed, or a file
        of the user's that cannot be opened or written, which stands on standard error then. Anything else is raised as
        it is.
    """
    try:
        return main() or 0
    except (UserError, MissingDependencyError) as error:  # the latter's file must be loadable alone
        problem = str(error)
    except OSError as error:
        if error.filename is None:  # of a connection, for example: nothing that a user would know
            raise
        problem = f"{error.filename}: {error.strerror}"
    print(f"{name + ': ' if name else ''}error: {problem}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR
