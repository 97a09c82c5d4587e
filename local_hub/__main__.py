"""Start a local Hub, or run one command against it."""

import argparse
import os
import subprocess
import sys
import threading
from pathlib import Path

from local_hub import LocalHub, Repository, environment, load_tokens
from local_hub.repository import ID_PATTERN

OTHER_HUBS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE")


def main() -> None:
    parser = argparse.ArgumentParser("python -m local_hub", description=__doc__)
    option = parser.add_argument
    option("--root", type=Path, default=Path("hub"), help="folder to keep it in")
    option("--host", default="127.0.0.1", help="a loopback address")
    option("--port", type=int, default=8787)
    option("--user", default="me", help="whose the first token is")
    add = "add a repository with the files of a folder, unless it exists"
    option("--add", action="append", default=[], metavar="KIND/OWNER/NAME=FOLDER", help=add)
    option("--verbose", action="store_true", help="log each request")
    run = "run the command that follows against it on a free port, then stop"
    option("--run", nargs=argparse.REMAINDER, help=run)
    args = parser.parse_args()
    tokens = load_tokens(args.root, args.user)
    for item in args.add:
        target, _, folder = item.partition("=")
        if not ID_PATTERN.fullmatch(target) or not Path(folder).is_dir():
            parser.error(f"--add={item} is not KIND/OWNER/NAME=FOLDER with an existing folder")
        repo = Repository(args.root, *target.split("/", 1))
        if not repo.exists:
            repo.create()
            repo.add_folder(Path(folder))
    try:
        hub = LocalHub(args.root, tokens, 0 if args.run else args.port, args.host, args.verbose)
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")
    hub.start()
    if args.run:
        variables = {name: os.environ[name] for name in os.environ if name not in OTHER_HUBS}
        sys.exit(subprocess.run(args.run, env=variables | environment(hub)).returncode)
    print(f"A Hub in {args.root}, until Ctrl-C. In the shell that uses it:\n  unset HF_TOKEN")
    for name, value in environment(hub).items():
        print(f"  export {name}={value}", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        hub.stop()


if __name__ == "__main__":
    main()
