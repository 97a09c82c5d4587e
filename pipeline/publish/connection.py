"""Connect to the Hub, retry failed calls, and convert errors to readable messages.

huggingface_hub retries uploads, but not the commit or the requests before and after it.
"""

import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from httpx2 import HTTPError, TransportError
from huggingface_hub import HfApi, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from pipeline.errors import UserError

logger = logging.getLogger(__name__)
BACKOFF = (1, 2, 4, 8, 8)  # seconds between attempts, as in huggingface_hub
SILENCE = 60  # seconds without data from the Hub after which a request fails
PATIENCE = 600  # seconds for which a call is retried
# Method, path and status of requests that huggingface_hub retries itself before it raises.
CLIENT_RETRIES = re.compile(r"PUT |.*(/preupload/|/objects/batch|/verify|/resolve/.* 429)")
CLIENT_ERRORS = (HTTPError, OSError, RuntimeError, ValueError)  # raised by huggingface_hub


def connect(anonymous: bool = False) -> HfApi:
    """Return a client with the user's token; with `anonymous`, the token is optional."""
    token = get_token()
    if not token and not anonymous:
        raise UserError("There is no Hub token: run `.venv/bin/hf auth login`, or set HF_TOKEN.")
    if token and not re.fullmatch(r"[!-~]+", token):  # HTTP libraries would quote it in the error
        raise UserError("The Hub token contains invalid characters: set HF_TOKEN again.")
    return HfApi(token=token or False)


def retry(call: Callable, *args, **kwargs):
    """Call a function, and retry after a pause if the Hub is busy or the connection breaks."""
    deadline = time.monotonic() + PATIENCE
    for pause in (*BACKOFF, PATIENCE):
        get_session().timeout = SILENCE  # on each attempt: the session may be new and has none
        try:
            return call(*args, **kwargs)
        except CLIENT_ERRORS as error:
            pause = max(pause, requested_pause(error))
            if not is_transient(error) or time.monotonic() + pause > deadline:
                raise
        logger.warning("The request to the Hub failed: retrying in %s s.", pause)
        time.sleep(pause)


def is_transient(error: Exception) -> bool:
    """Return whether a retry may succeed: the Hub was busy, or the connection broke."""
    error = root_http_error(error)
    if not isinstance(error, (HfHubHTTPError, TransportError)):
        return isinstance(error, json.JSONDecodeError)  # an error page from a proxy
    response = getattr(error, "response", None)
    request, status = (response or error).request, response.status_code if response else 0
    if CLIENT_RETRIES.match(f"{request.method} {request.url.path} {status}"):
        return False
    return status in (0, 429) or status >= 500


def requested_pause(error: Exception) -> int:
    """Return the wait in seconds that the Hub requests in a header, or 0."""
    headers = getattr(getattr(root_http_error(error), "response", None), "headers", {})
    text = headers.get("Retry-After") or headers.get("RateLimit", "").rpartition("t=")[2]
    return int(text) if text.isdecimal() else 0


def root_http_error(error: BaseException) -> BaseException:
    """Return the HTTP error that caused a client's exception, or else the exception itself."""
    cause = error
    while cause is not None and not isinstance(cause, (HfHubHTTPError, TransportError)):
        cause = cause.__cause__ or cause.__context__
    return cause or error


@contextmanager
def hub_errors(api: HfApi, repo: str) -> Iterator[None]:
    """Convert the client's exceptions into a UserError of one sentence, without the token."""
    hub = f"the Hub at {api.endpoint}"
    try:
        yield
    except RepositoryNotFoundError:
        raise UserError(f'There is no "{repo}" on {hub}, or the token lacks access.') from None
    except CLIENT_ERRORS as error:
        cause, reason = root_http_error(error), " ".join(str(error).split())
        if isinstance(cause, HfHubHTTPError):
            status, pause = cause.response.status_code, requested_pause(error)
            reason = f"{hub} answered {status} ({cause.server_message or 'without a message'})"
            reason += f" and asks to wait {pause} s" if pause else ""
            if status in (401, 403):
                reason += ": run `.venv/bin/hf auth login` with a token that can write there"
        elif isinstance(cause, (TransportError, json.JSONDecodeError)):
            reason = f"{hub} can't be reached ({type(cause).__name__})"
        reason = reason.replace(api.token, "***") if api.token else reason
        raise UserError(f'"{repo}": {reason or type(error).__name__}.') from None
