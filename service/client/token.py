"""The bearer token: from an argument, a file or the environment; never shown, never sent far in the clear."""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from placement.errors import InputError

__all__ = ["DEFAULT_URL", "TOKEN_VARIABLE", "URL_VARIABLE", "checked_url", "find_token", "is_loopback"]

TOKEN_VARIABLE = "MOE_PLACEMENT_TOKEN"
FILE_VARIABLE = "MOE_PLACEMENT_TOKEN_FILE"
URL_VARIABLE = "MOE_PLACEMENT_URL"
DEFAULT_URL = "http://127.0.0.1:8700"

MOST_TOKEN_BYTES = 4096
_VISIBLE = re.compile(r"[\x21-\x7e]+")


def find_token(
    token: str | None = None,
    *,
    file: str | os.PathLike[str] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> str | None:
    """Return the token to send: as given, from a file, or from the environment; None for none.

    Raises
    ------
    InputError
        If the file cannot be read, everybody may read it, or what it holds is no token.
    """
    if token is not None:
        return _checked(token, "the token")
    if file is not None:
        return _from_file(Path(file))
    if found := environment.get(TOKEN_VARIABLE):
        return _checked(found, TOKEN_VARIABLE)
    if named := environment.get(FILE_VARIABLE):
        return _from_file(Path(named))
    return None


def _from_file(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            content = stream.read(MOST_TOKEN_BYTES + 1)
    except OSError as exc:
        raise InputError(f"token file {path} cannot be read: {exc.strerror}") from exc
    if mode & stat.S_IROTH:
        raise InputError(f"token file {path} can be read by everybody; chmod 600 {path}")
    return _checked(content.decode("latin-1").strip(), f"token file {path}")


def _checked(token: str, where: str) -> str:
    if len(token) > MOST_TOKEN_BYTES or _VISIBLE.fullmatch(token) is None:
        # The text itself is not repeated: it may be most of a secret.
        raise InputError(f"{where} holds no token: one word of letters, digits and signs is wanted")
    return token


def checked_url(url: str | None, *, has_token: bool, allow_http: bool) -> str:
    """Return the service's URL without a slash at the end.

    Parameters
    ----------
    url
        Default: ``MOE_PLACEMENT_URL``, or the port of ``serve`` on this machine.
    allow_http
        Whether a token may go over the network unencrypted.

    Raises
    ------
    InputError
        If it is no http(s) URL, holds a password, or would show the token to the network.
    """
    text = (url or os.environ.get(URL_VARIABLE) or DEFAULT_URL).rstrip("/")
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError as exc:
        raise InputError(f"the service's URL is malformed: {exc}") from exc
    if parts.scheme not in ("http", "https") or not host:
        raise InputError(f"{text!r} is no URL of a service; it looks like {DEFAULT_URL}")
    if parts.username is not None or parts.password is not None:
        raise InputError("the service's URL holds a user or a password; give a token instead")
    if parts.query or parts.fragment:
        raise InputError(f"{text!r} has a query or a fragment; name only host, port and path")
    if has_token and parts.scheme == "http" and not is_loopback(host) and not allow_http:
        raise InputError(
            f"the token is not sent to {host} over plain http; use https, or allow it with --allow-http "
            "(allow_http=True) on a network that you trust"
        )
    return text


def is_loopback(host: str) -> bool:
    """Whether a host name means this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
