"""Refuses to serve what others could reach or change: combinations of settings that are not safe."""

from __future__ import annotations

import grp
import ipaddress
import os
import pwd
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from placement.errors import InputError
from service.settings import Settings

__all__ = ["check_exposure", "is_loopback"]

_PROXY_VARIABLES = ("FORWARDED_ALLOW_IPS", "UVICORN_FORWARDED_ALLOW_IPS", "UVICORN_PROXY_HEADERS")
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_MAKE_ONE = "make a token first: moe-placement token create NAME --scope admin"


class _Tokens(Protocol):
    def any(self) -> bool: ...


def check_exposure(settings: Settings, tokens: _Tokens, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse to start where strangers could call without a token, or change the state behind our back.

    Raises
    ------
    InputError
        Naming what is not safe, and what to do.
    """
    for folder in (settings.data_dir, settings.data_dir / "artifacts", settings.data_dir / "scratch"):
        _check_folder(folder)
    _check_database(settings)
    if settings.role == "worker" or tokens.any():
        return
    if not is_loopback(settings.host):
        raise InputError(
            f"--host {settings.host} can be reached from other machines, and there is no token; {_MAKE_ONE}, "
            "or listen on 127.0.0.1"
        )
    for name in _PROXY_VARIABLES:
        if environment.get(name):
            raise InputError(f"{name} is set for a proxy, through which strangers may come; {_MAKE_ONE}")


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address means this machine alone."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return address.is_loopback or (mapped is not None and mapped.is_loopback)


def _check_folder(folder: Path) -> None:
    try:
        about = folder.stat()
    except FileNotFoundError:
        return
    if about.st_mode & stat.S_IWOTH or (about.st_mode & stat.S_IWGRP and _is_shared(about.st_gid)):
        raise InputError(
            f"{folder} can be written by others (mode {stat.S_IMODE(about.st_mode):04o}); chmod go-w {folder}"
        )
    if about.st_uid not in (os.geteuid(), 0):
        raise InputError(f"{folder} belongs to user {about.st_uid}, not to the one that serves; chown it")


def _is_shared(group_id: int) -> bool:
    """Whether a group has other members than us; mounted volumes often come with one of our own."""
    if group_id not in {os.getegid(), *os.getgroups()}:
        return True
    try:
        members = set(grp.getgrgid(group_id).gr_mem)
        return bool(members - {pwd.getpwuid(os.geteuid()).pw_name})
    except KeyError:
        return False


def _check_database(settings: Settings) -> None:
    """The file holds hashes of tokens: others have no business in it."""
    if not settings.database.startswith("sqlite:///"):
        return
    path = Path(settings.database.removeprefix("sqlite:///"))
    if path.exists() and path.stat().st_mode & (_OTHERS_WRITE | stat.S_IROTH):
        mode = stat.S_IMODE(path.stat().st_mode)
        raise InputError(f"{path} can be read or written by others (mode {mode:04o}); chmod 600 {path}")
