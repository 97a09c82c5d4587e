"""How a script is started: as one process, or as several on one or more hosts by `accelerate`.

A launcher is a configuration of `accelerate` in `pipeline/launchers`. Hosts meet by torchrun's
c10d rendezvous, which accelerate takes from its command line only: the same keys in its file
are ignored (accelerate 1.15).
"""

import os
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

import psutil
import yaml

from pipeline.errors import UserError

LAUNCHERS = Path(__file__).parent / "launchers"
PORT = 29500
RESTARTS = 3  # of a host's processes, after another host was lost


def command(
    script: list[str],
    launcher: str | None = None,
    nproc: int = 1,
    nnodes: int = 1,
    main: str | None = None,
) -> list[str]:
    """The command that starts `script`, a path and its arguments, with this Python.

    `nproc` processes on each of `nnodes` hosts, which meet at `main`, the first host's
    host:port. `launcher` is a name in `pipeline/launchers` or a YAML file, ddp by default.
    UserError for what can't be started here.
    """
    if nproc < 1 or nnodes < 1:
        raise UserError("NPROC and NNODES are numbers of processes and hosts: 1 or more.")
    if nproc * nnodes == 1:
        return [sys.executable, *script]
    if nnodes > 1 and "--restart" in script:
        raise UserError(
            "With several hosts --restart would begin anew whenever a host comes back: remove the "
            "run's folders in models/ and models/checkpoints/ instead."
        )
    config = _find(launcher or ("ddp" if nnodes == 1 else "hosts"))
    _check_can_run(config)
    options = ["--config_file", config, "--num_processes", nproc * nnodes]
    options += ["--num_machines", nnodes, "--dynamo_backend", "no"]
    if nnodes == 1:
        options += ["--main_process_port", 0]  # any free one: two runs may share a host
    else:
        host, port = endpoint(main)
        # Ranks are given out where hosts meet. With a rank of 0, accelerate asks for a free port.
        options += ["--machine_rank", 0 if is_here(host) else 1]
        options += ["--main_process_ip", host, "--main_process_port", port]
        options += ["--rdzv_backend", "c10d", "--max_restarts", RESTARTS]
        options += ["--rdzv_conf", f"is_host={is_here(host)}".lower()]
    return [sys.executable, "-m", "accelerate.commands.launch", *map(str, options), *script]


def environment(main: str | None = None) -> dict[str, str]:
    """Variables that let hosts find one another by address, whatever their names resolve to.

    Of several addresses, the one by which this host reaches `main`.
    """
    if main is None:
        return {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(endpoint(main))  # nothing is sent: it only picks the way
        except OSError as error:
            raise UserError(f"This host has no way to MAIN={main}: {error}.") from None
        own = probe.getsockname()[0]
    interface = next(
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(address.address == own for address in addresses)
    )
    found = {
        "PET_LOCAL_ADDR": own,  # torchrun's --local_addr
        "GLOO_SOCKET_IFNAME": interface,  # else gloo asks for the host's name
        # Else (torch 2.13) a host that stays looks for the store of one that was lost for ever.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    return {name: value for name, value in found.items() if name not in os.environ}


def endpoint(main: str | None) -> tuple[str, int]:
    """host:port as the host's IPv4 address and the port; UserError where there is none."""
    host, _, port = (main or "").partition(":")
    if not host or not (port or "0").isdigit():
        raise UserError(
            "Several hosts meet at the first one's address: give it to each as MAIN=host:port."
        )
    try:
        return socket.gethostbyname(host), int(port or PORT)
    except OSError as error:
        raise UserError(f'The host "{host}" of MAIN={main} is not known: {error}.') from None


def is_here(address: str) -> bool:
    """Whether this IPv4 address is one of this host's own: only such can be listened at."""
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _find(launcher: str) -> Path:
    is_file = launcher.endswith((".yaml", ".yml"))
    path = Path(launcher) if is_file else LAUNCHERS / f"{launcher}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in LAUNCHERS.glob("*.yaml")))
        raise UserError(
            f'There is no launcher "{launcher}"; choose from {known}, or name a YAML file.'
        )
    return path


def _check_can_run(config: Path) -> None:
    kind = yaml.safe_load(config.read_text()).get("distributed_type")
    if kind == "DEEPSPEED" and find_spec("deepspeed") is None:
        raise UserError("DeepSpeed is not installed: .venv/bin/pip install deepspeed.")
    if kind == "FSDP":
        import torch  # takes seconds: only where it is asked

        if not torch.accelerator.is_available():
            raise UserError(
                f"{config.stem} shards over accelerators, and this host has none (accelerate "
                "would train whole copies of the model without a word): use LAUNCHER=ddp."
            )
