"""Trying again: a fault that may pass is met with waits that double, until a deadline; any other is raised at once.

In: an action on a remote store. Out: its result, or one error that says what was asked of which URI, how often and how long.
An action must be safe to repeat: a read, or a write of a whole object. The waits are random within a factor of two, so that
a thousand readers do not come back at the same moment. The price of a deadline is that a store that is gone, or a host name
that is wrong, is believed only after it; the warnings of the log say so from the first fault on.
"""

import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

DEADLINE_S = 120.0
FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 15.0

_PERMANENT_ERRORS = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
_HTTP_STATUS = re.compile(r"HTTP status (\d{3})")
_PERMANENT_STATUS = re.compile(r"[34]..|501|505")
_TRANSIENT_STATUS = re.compile(r"408|425|429")
# Codes that S3 sends with the status 400 or 409 although they pass.
_PASSING = re.compile(r"Request_?Timeout|Slow_?Down|Throttl|Operation_?Aborted", re.IGNORECASE)
# What pyarrow's stores call a refusal where they do not give the HTTP status.
_REFUSED = re.compile(
    r"AWS Error (ACCESS_DENIED|INVALID_\w+|SIGNATURE_\w+|\w*TOKEN\w*|UNRECOGNIZED_CLIENT|MISSING_\w+|NO_SUCH_\w+|"
    r"RESOURCE_NOT_FOUND|OPT_IN_REQUIRED|ACCOUNT_PROBLEM|NOT_SIGNED_UP|BUCKET_ALREADY_\w+|METHOD_NOT_ALLOWED)"
    r"|PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT|FAILED_PRECONDITION|NOT_FOUND|AuthenticationFailed|AuthorizationFailure"
    r"|not found|does not exist|not supported|not a regular file"
    r"|CertificateError|CERTIFICATE_VERIFY_FAILED|certificate verify failed|peer certificate|Invalid ?U[Rr][Ll]"
)
_DENIED = re.compile(r"HTTP status 40[13]|ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE|PERMISSION_DENIED|UNAUTH|Auth\w+Fail")

logger = logging.getLogger(__name__)
_deadline_s: ContextVar[float | None] = ContextVar("retry_deadline_s", default=None)

T = TypeVar("T")


class StorageError(OSError):
    """A remote store refused, or kept failing until the deadline; the message names the URI and the last fault."""


@contextmanager
def retry_deadline(seconds: float) -> Iterator[None]:
    """Sets the deadline of every retry inside, in this thread; 0 tries once. Default: `DEADLINE_S`."""
    token = _deadline_s.set(seconds)
    try:
        yield
    finally:
        _deadline_s.reset(token)


def is_transient(error: OSError) -> bool:
    """Whether the same request may succeed later: a timeout, a reset, a short body, throttling, 408, 425, 429 or 5xx."""
    text = str(error)
    if _PASSING.search(text):
        return True
    if status := _HTTP_STATUS.search(text):
        return bool(_TRANSIENT_STATUS.fullmatch(status[1])) or not _PERMANENT_STATUS.fullmatch(status[1])
    return not _REFUSED.search(text)


def retrying(action: Callable[[], T], what: str) -> T:
    """Does an action on a remote store, again and again while its fault may pass.

    Args:
        action: Raises OSError for a fault; safe to repeat.
        what: Verb and URI for messages, "read s3://bucket/key".

    Raises:
        StorageError: Refused, or the deadline has passed.
        FileNotFoundError: No such object.
    """
    chosen = _deadline_s.get()
    deadline_s = DEADLINE_S if chosen is None else chosen
    started, attempt = time.monotonic(), 0
    while True:
        attempt += 1
        try:
            return action()
        except (*_PERMANENT_ERRORS, StorageError):
            raise
        except OSError as error:
            elapsed_s = time.monotonic() - started
            if not is_transient(error):
                denied = "; check the credentials of this process" if _DENIED.search(str(error)) else ""
                raise StorageError(f"cannot {what}: {error}{denied}") from error
            wait_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0)
            if elapsed_s + wait_s > deadline_s:
                count = f"{attempt} attempt{'s' if attempt > 1 else ''}"
                raise StorageError(f"cannot {what}: {count} in {elapsed_s:.1f} s, the last fault: {error}") from error
            logger.warning("cannot %s (attempt %d: %s); again in %.1f s", what, attempt, error, wait_s)
            time.sleep(wait_s)
