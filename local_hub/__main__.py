"""Start a local Hub, or run a command with it."""

import argparse
import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

from local_hub import LocalHub, Repository
from local_hub.repository import ID_PATTERN

OTHER_HUBS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE")
# Variables that make clients use it, if set before they import huggingface_hub.
VARIABLES = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost") | {
    "HF_ENDPOINT": "{url}",
    "HF_TOKEN_PATH": "{root}/token",
    "HF_HOME": "{root}/home",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "DISABLE_SAFETENSORS_CONVERSION": "1",
}


def main() -> None:
    parser = argparse.ArgumentParser("python -m local_hub", description=__doc__)
    option = parser.add_argument
    option("--root", type=Path, default=Path("hub"), help="folder for the Hub's data")
    option("--port", type=int, default=8787)
    option("--user", default="me", help="owner of the first token")
    add = "add a repository with a folder's files, unless it exists"
    option("--add", action="append", default=[], metavar="KIND/OWNER/NAME=FOLDER", help=add)
    run = "run the following command with a Hub on a free port, then stop"
    option("--run", nargs=argparse.REMAINDER, help=run)
    args = parser.parse_args()
    os.umask(0o077)  # only the user may read the token
    root = args.root.absolute()
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "tokens.json").exists():
        user = {"name": args.user, "role": "write", "orgs": []}
        (root / "token").write_text(token := f"hf_{secrets.token_hex(17)}")
        (root / "tokens.json").write_text(json.dumps({token: user}))
    for item in args.add:
        target, _, folder = item.partition("=")
        if not ID_PATTERN.fullmatch(target) or not Path(folder).is_dir():
            parser.error(f"--add={item}: use KIND/OWNER/NAME=FOLDER with an existing folder")
        repo = Repository(root, *target.split("/", 1))
        if not repo.state:
            repo.create()
            repo.add_folder(Path(folder))
    tokens = json.loads((root / "tokens.json").read_text())
    try:
        hub = LocalHub(root, tokens, 0 if args.run else args.port)
    except OSError as error:
        sys.exit(f"Error: Port {args.port}: {os.strerror(error.errno)}. Choose another.")
    hub.start()
    variables = {key: value.format(root=root, url=hub.url) for key, value in VARIABLES.items()}
    if args.run:
        others = {name: value for name, value in os.environ.items() if name not in OTHER_HUBS}
        sys.exit(subprocess.run(args.run, env=others | variables).returncode)
    print(f"The Hub in {root} runs until Ctrl-C. To use it in a shell:\n  unset HF_TOKEN")
    print("\n".join(f"  export {key}={value}" for key, value in variables.items()), flush=True)
    try:
        hub.thread.join()
    except KeyboardInterrupt:
        hub.stop()


if __name__ == "__main__":
    main()
