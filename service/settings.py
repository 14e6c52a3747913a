"""Settings of the service, from MOE_PLACEMENT_* variables and the command line; insecure ones are refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from placement.errors import InputError

__all__ = ["Settings", "read_settings"]

PREFIX = "MOE_PLACEMENT_"
LISTEN_PORT = f"{PREFIX}LISTEN_PORT"

MIB = 1 << 20
GIB = 1 << 30


class Settings(BaseSettings):
    """How one server process runs.

    Every field is read from ``MOE_PLACEMENT_<NAME>``; the database also from ``DATABASE_URL``.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="ignore", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(default=8700, ge=0, le=65535, validation_alias=LISTEN_PORT)
    """From another variable: Kubernetes sets ``MOE_PLACEMENT_PORT`` to a URL for a Service of that name."""
    role: Literal["all", "api", "worker"] = "all"
    data_dir: Path = Path("moe-placement-data")
    """Database (by default), artifacts, scratch files."""
    database_url: str | None = Field(
        default=None, validation_alias=AliasChoices("MOE_PLACEMENT_DATABASE_URL", "DATABASE_URL")
    )
    artifact_url: str | None = None
    """fsspec URL of shared artifacts, where workers run on several machines."""

    cpus: int = Field(default=0, ge=0)
    """Threads that solves of this process may use together; 0 for all cores."""
    solve_memory_bytes: int = Field(default=16 * GIB, ge=256 * MIB)
    """Memory of one solve; above it is killed."""
    max_solve_seconds: float = Field(default=3600.0, gt=0)
    """Time of one solve, whatever it asked for; above it is killed and keeps its incumbent."""
    max_threads: int = Field(default=64, ge=1)
    max_queued: int = Field(default=100_000, ge=1)
    stop_grace_seconds: float = Field(default=0.3, gt=0)
    """How long a solve that was told to stop may take before it is killed and its last incumbent stands."""
    lease_seconds: float = Field(default=15.0, gt=0)
    """How long a worker's sign of life may stand still before its jobs are taken from it."""
    poll_seconds: float = Field(default=0.05, gt=0)
    """How often state that other processes change is looked at while somebody waits for it."""

    max_upload_bytes: int = Field(default=2 * GIB, ge=1)
    max_unpacked_bytes: int = Field(default=16 * GIB, ge=1)
    max_body_bytes: int = Field(default=32 * MIB, ge=1024)
    """Body of any other request."""
    body_idle_seconds: float = Field(default=30.0, gt=0)
    """How long the next bytes of a body may take."""
    requests_per_minute: int = Field(default=0, ge=0)
    """Requests of one token that has no rate of its own; 0 for any number."""
    retention_days: float = Field(default=90.0, gt=0)
    least_free_bytes: int = Field(default=64 * MIB, ge=0)
    """Room on the data directory's disk below which the server says that it is not ready."""

    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def database(self) -> str:
        """URL of the database."""
        if self.database_url is not None:
            return self.database_url
        return f"sqlite:///{self.data_dir.absolute() / 'state.db'}"

    def environment(self) -> dict[str, str]:
        """Return the environment of a process that is to run with these settings."""
        given = {name: value for name, value in self if value is not None}
        given["data_dir"] = self.data_dir.absolute()
        return dict(os.environ) | {_variable(name): str(value) for name, value in given.items()}


_ALIASES = {"port": LISTEN_PORT}
"""Fields whose variable has another name than the field."""


def _variable(field: str) -> str:
    return _ALIASES.get(field, f"{PREFIX}{field.upper()}")


def read_settings(**given: Any) -> Settings:
    """Return the settings of the environment; what is given here goes first.

    Raises
    ------
    InputError
        If one makes no sense: which, and why.
    """
    try:
        return Settings(**{_ALIASES.get(name, name): v for name, v in given.items() if v is not None})
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        field = next((own for own, alias in _ALIASES.items() if alias == name), name)
        option = f"--{field.replace('_', '-')}" if given.get(field) is not None else _variable(field)
        raise InputError(f"{option}: {first['msg']}") from None
