"""Start a script as one process or several, on one host or several, through accelerate."""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from pipeline import launcher
from pipeline.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--nproc", type=int, default=1, help="processes on each host")
    parser.add_argument("--launcher", help="a name in pipeline/launchers, or a YAML file")
    parser.add_argument("--nnodes", type=int, default=1, help="hosts")
    parser.add_argument("--main", help="host:port of the first host, where all meet")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="what to start, and its arguments")
    given = parser.parse_args()

    command = launcher.command(given.script, given.launcher, given.nproc, given.nnodes, given.main)
    main = given.main if given.nnodes > 1 else None
    os.execve(command[0], command, os.environ | launcher.environment(main))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"Error: {error}")
