"""What a result was made with: library versions, hardware, and the code's own revision."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

LIBRARIES = ("torch", "transformers", "datasets", "evaluate", "accelerate", "huggingface_hub")


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def hardware() -> str:
    """The processor that did the work, as "2 cores of AMD EPYC" or "NVIDIA H100 80GB HBM3"."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return (f"{count} x " if count > 1 else "") + torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} cores of {_processor()}"


def code_revision() -> str | None:
    """The commit of the code, with "+changes" where files differ from it; None outside git."""
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def fast_bfloat16() -> bool:
    """Whether bfloat16 is quicker than float32 here: an accelerator, or a CPU made for it."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "amx_tile", "bf16"))


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
