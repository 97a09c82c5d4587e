"""Ask the Hub for the commit behind a name, before anything long begins."""

import os

import httpx2
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pipeline.errors import UserError

TIMEOUT = 10  # seconds


def hub_commit(repo_type: str, name: str, revision: str | None = None) -> str | None:
    """The commit hash of a "model" or "dataset" on the Hub; None offline (the cache decides).

    Raises UserError where the Hub can't be reached, or has no such repository or revision.
    """
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        return (
            HfApi()
            .repo_info(name, repo_type=repo_type, revision=revision, timeout=TIMEOUT, token=None)
            .sha
        )
    except OfflineModeIsEnabled:
        return None
    except RevisionNotFoundError:
        raise UserError(f'The {repo_type} "{name}" has no revision "{revision}".') from None
    except GatedRepoError:
        raise UserError(
            f'The {repo_type} "{name}" is gated: accept its terms on the Hub and log in '
            "with `hf auth login`."
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f'There is no {repo_type} "{name}": no such local folder, and no such repository '
            "on the Hub (a private one needs `hf auth login`)."
        ) from None
    except (httpx2.TransportError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f'Cannot reach the Hub at {constants.ENDPOINT} for the {repo_type} "{name}" '
            f"({type(error).__name__}). `make demo` needs no Hub; DATASET= and MODEL= also take "
            "local folders; HF_ENDPOINT names another Hub; HF_HUB_OFFLINE=1 uses what is cached."
        ) from None


def is_local(name: str) -> bool:
    """Whether a name is a folder here; UserError where it is written as a path and is not there."""
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return True
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f'There is no folder "{name}".')
    return False
