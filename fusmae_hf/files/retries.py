"""Trying again where storage stalls: a network file system that is remounted, a Hub that is busy."""

import errno
import warnings
from collections.abc import Callable
from time import sleep
from typing import TypeVar

WAITS = (1.0, 4.0, 15.0, 40.0)
"""Seconds before the second to the fifth try: a minute in all, well below the ten minutes after which the other
processes of a run give up waiting."""

_ERRNOS = frozenset(
    getattr(errno, name)
    for name in (
        "EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "ENODEV", "ENXIO", "ENOTCONN", "EREMOTEIO", "EHOSTDOWN",
        "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EPIPE",
    )
    if hasattr(errno, name)
)  # fmt: skip
"""What storage that comes back says meanwhile. No memory, no space, no permission and damage are not among them."""

_HTTP_STATUS = frozenset((408, 425, 429, 500, 502, 503, 504))

_NETWORK_LIBRARIES = frozenset(("aiohttp", "httpx", "httpx2", "httpcore", "httpcore2"))
"""Libraries under fsspec and huggingface_hub whose errors of transport are no `OSError`."""

_given_up: set[str] = set()
_out_of_patience = False

T = TypeVar("T")


def retried(read: Callable[[], T], name: str, *, is_missing_for_now: Callable[[], bool] = lambda: False) -> T:
    """What `read` returns, tried five times within about a minute where it fails as storage does that comes back.

    Each further try is announced with a warning. A file that was given up is tried once from then on, and so are all
    others until one can be read: without storage a run ends soon, whatever `on_bad_files` says.

    Args:
        read: reads again from the start.
        name: file or URL, for messages.
        is_missing_for_now: asked where the file is not there; True where that may pass.

    Raises:
        Exception: what the last try raised.
    """
    global _out_of_patience
    waits = () if _out_of_patience or name in _given_up else WAITS
    for number, wait in enumerate((*waits, None), 1):
        try:
            value = read()
        except Exception as error:
            if not is_passing(error) and not (_is_missing(error) and is_missing_for_now()):
                raise
            if wait is None:
                _given_up.add(name)
                _out_of_patience = True
                raise
            reason = _causes(error)[-1]
            warnings.warn(
                f"{name} cannot be read at the moment ({type(reason).__name__}: {reason}). Try {number + 1} of "
                f"{len(waits) + 1} in {wait:g} s.",
                stacklevel=2,
            )
            sleep(wait)
        else:
            _given_up.discard(name)
            _out_of_patience = False
            return value
    raise AssertionError("the last try returns or raises")


def forget_failures() -> None:
    """Be patient again with all files."""
    global _out_of_patience
    _given_up.clear()
    _out_of_patience = False


def is_passing(error: BaseException) -> bool:
    """True where an error, or one that caused it, is of storage that may come back."""
    return any(map(_is_passing, _causes(error)))


def _is_passing(error: BaseException) -> bool:
    response = getattr(error, "response", None)
    if response is not None and hasattr(response, "status_code"):
        return response.status_code in _HTTP_STATUS
    if isinstance(status := getattr(error, "status", None), int):  # aiohttp
        return status in _HTTP_STATUS
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if isinstance(error, OSError):
        return error.errno in _ERRNOS
    return type(error).__module__.partition(".")[0] in _NETWORK_LIBRARIES and _is_transport(error)


def _is_transport(error: BaseException) -> bool:
    """True for errors of a connection, as against a URL that is none or an answer that was a refusal."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"TransportError", "ClientConnectionError", "ClientPayloadError", "NetworkError"})


def _is_missing(error: BaseException) -> bool:
    return any(isinstance(cause, FileNotFoundError) for cause in _causes(error))


def _causes(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from, one after the other."""
    found = [error]
    while (cause := found[-1].__cause__) is not None and cause not in found:
        found.append(cause)
    return found
