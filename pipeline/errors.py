"""The exception for mistakes that a user can correct, and the function that catches it."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake that the user can correct; the message says what is wrong and what to do."""


def shorten(items: list) -> str:
    """Return the first three items of a list as text, and how many more there are."""
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return ", ".join(str(item) for item in items[:3]) + more


def run_main(main: Callable[[], None], interrupted: str = "Stopped.") -> None:
    """Run a script's `main`; a UserError becomes one line on stderr and exit status 1.

    Args:
        main: The script's entry point.
        interrupted: What to print after Ctrl-C.
    """
    try:
        main()
    except UserError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\n{interrupted}")


def confirm(question: str, yes: bool) -> None:
    """Ask for confirmation in a terminal, unless `yes` is set; UserError if it is not given."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError(f"{question} Name the repository with REPO=, or confirm with ARGS=--yes.")
    if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("Nothing was sent. Name another repository with REPO=.")
