"""A Hugging Face Hub on loopback, to rehearse publishing, for air-gapped use and for tests."""

import ipaddress
import json
import secrets
import socket
import threading
import time
from pathlib import Path

import uvicorn

from local_hub.app import build_app
from local_hub.repository import Repository as Repository


class LocalHub:
    """A Hub whose repositories lie in the folder `root`; it answers on a loopback address only.

    `tokens` has for each token its user's {"name", "role": "read" or "write", "orgs": [names]}.
    """

    def __init__(self, root: Path, tokens: dict, port=0, host="127.0.0.1", verbose=False):
        if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
            raise ValueError(f"The local Hub answers on loopback only, not on {host}.")
        self.root = root.absolute()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
        names = [f"[{host}]" if ":" in host else host, "127.0.0.1", "localhost", "[::1]"]
        origins = [f"http://{name}:{listener.getsockname()[1]}" for name in names]
        self.url, app = origins[0], build_app(self.root, tokens, origins, verbose)
        options = {"lifespan": "off", "ws": "none", "log_config": None, "access_log": False}
        options |= {"proxy_headers": False, "timeout_keep_alive": 60}
        self.config = uvicorn.Config(app, timeout_graceful_shutdown=1, **options)
        self._server = uvicorn.Server(self.config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)

    def start(self) -> None:
        """Serve in a thread of its own; return when connections are accepted."""
        self._thread.start()
        while not self._server.started:
            time.sleep(0.001)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()


def load_tokens(root: Path, user: str) -> dict:
    """Read `root/tokens.json`; at first, write one token for what `user` owns."""
    if not (root / "tokens.json").exists():
        root.mkdir(parents=True, exist_ok=True)
        token = f"hf_{secrets.token_hex(17)}"
        tokens = json.dumps({token: {"name": user, "role": "write", "orgs": []}})
        for name, text in (("token", token), ("tokens.json", tokens)):
            (root / name).touch(mode=0o600)
            (root / name).write_text(text)
    return json.loads((root / "tokens.json").read_text())


def environment(hub: LocalHub) -> dict[str, str]:
    """Return the variables that point clients to a Hub, if they are set before the import."""
    flags = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_UPDATE_CHECK", "DISABLE_SAFETENSORS_CONVERSION")
    paths = {"HF_TOKEN_PATH": str(hub.root / "token"), "HF_HOME": str(hub.root / "home")}
    constants = {"HF_UPDATE_DOWNLOAD_COUNTS": "0", **dict.fromkeys(flags, "1")}
    past_proxy = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
    return {"HF_ENDPOINT": hub.url, **paths, **constants, **past_proxy}
