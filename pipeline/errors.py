"""The one exception for mistakes that a user can correct, and where every script catches it."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """One sentence that names what is wrong and the way out."""


def run_main(main: Callable[[], None], interrupted: str = "Stopped.") -> None:
    """Run a script's `main`; a UserError becomes one line on stderr and exit status 1.

    Args:
        main: The script's entry point.
        interrupted: What to say after Ctrl-C.
    """
    try:
        main()
    except UserError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\n{interrupted}")
