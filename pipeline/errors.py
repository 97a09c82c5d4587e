"""The one exception for mistakes that a user can correct, and where every script catches it."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """One sentence that names what is wrong and the way out."""


def shorten(items: list) -> str:
    """Return the first three of a list for a sentence, and how many more there are."""
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return ", ".join(str(item) for item in items[:3]) + more


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


def confirm(question: str, yes: bool) -> None:
    """Ask in a terminal; UserError unless the answer is yes, or `yes` is given already."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError(f"{question} Name it with REPO=, or confirm with ARGS=--yes.")
    if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("Nothing was sent. Name another with REPO=.")
