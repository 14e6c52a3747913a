"""What a job's environment says about its placement: variables that any launcher can hand on.

========================== =====================================================================
MOE_PLACEMENT_DEPLOYMENT   name of the deployment; the one variable that must be there
MOE_PLACEMENT_URL          the service; default: the port of ``serve`` on this machine
MOE_PLACEMENT_TOKEN        bearer token
MOE_PLACEMENT_TOKEN_FILE   or a file that holds it
MOE_PLACEMENT_ALLOW_HTTP   1: send the token unencrypted to another machine, too
MOE_PLACEMENT_CACHE_DIR    folder that keeps the last good placement
MOE_PLACEMENT_SHARED       folder that all ranks see, where no broadcast is at hand
MOE_PLACEMENT_TOPOLOGY     with MOE_PLACEMENT_MODEL: what the job is, for experts in order
MOE_PLACEMENT_MODEL        preset, model file or checkpoint folder
MOE_PLACEMENT_STRICT       1: do not start without the service
MOE_PLACEMENT_WAIT         seconds to wait for a deployment's first placement; default: 0
MOE_PLACEMENT_TIMEOUT      seconds until the service counts as down; default: 30
========================== =====================================================================
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from placement.errors import InputError
from service.client.fallback import Fallback
from service.client.token import FILE_VARIABLE, TOKEN_VARIABLE, URL_VARIABLE

__all__ = ["PREFIX", "options_of"]

PREFIX = "MOE_PLACEMENT_"
TOPOLOGY, MODEL = f"{PREFIX}TOPOLOGY", f"{PREFIX}MODEL"

_TEXTS = {
    "deployment": f"{PREFIX}DEPLOYMENT",
    "url": URL_VARIABLE,
    "cache_dir": f"{PREFIX}CACHE_DIR",
    "shared_dir": f"{PREFIX}SHARED",
}
_SWITCHES = {"strict": f"{PREFIX}STRICT", "allow_http": f"{PREFIX}ALLOW_HTTP"}
_SECONDS = {"wait_s": f"{PREFIX}WAIT", "timeout_s": f"{PREFIX}TIMEOUT"}

_ON, _OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def options_of(environment: Mapping[str, str], *, given: Collection[str] = ()) -> dict[str, Any]:
    """Return the parameters of a `PlacementClient` that an environment sets.

    Parameters
    ----------
    given
        Parameters that are known already: their variables are not looked at.

    Raises
    ------
    InputError
        If no deployment is named, or a variable makes no sense: which, and why.
    """
    found: dict[str, Any] = {name: environment.get(variable) for name, variable in _TEXTS.items()}
    found |= {name: _switch(environment, variable) for name, variable in _SWITCHES.items()}
    found |= {name: _seconds(environment, variable) for name, variable in _SECONDS.items()}
    if not {"token", "token_file"} & set(given):
        found |= _token(environment)
    if "fallback" not in given:
        found["fallback"] = _fallback(environment)
    if not found["deployment"] and "deployment" not in given:
        raise InputError(f"{_TEXTS['deployment']} is not set: name the deployment whose placement runs here")
    return {name: value for name, value in found.items() if value not in (None, "") and name not in given}


def _token(environment: Mapping[str, str]) -> dict[str, str | None]:
    """Return the token, or else where it lies: whether it does is found out when it is needed."""
    token = environment.get(TOKEN_VARIABLE)
    return {"token": token} if token else {"token_file": environment.get(FILE_VARIABLE)}


def _fallback(environment: Mapping[str, str]) -> Fallback | None:
    topology, model = environment.get(TOPOLOGY), environment.get(MODEL)
    if not topology and not model:
        return None
    if not topology or not model:
        there, missing = (TOPOLOGY, MODEL) if topology else (MODEL, TOPOLOGY)
        raise InputError(f"{there} needs {missing}: both are needed to put experts in order")
    try:
        return Fallback.of(topology, model)
    except InputError as exc:
        raise InputError(f"{TOPOLOGY} or {MODEL}: {exc}") from exc


def _switch(environment: Mapping[str, str], variable: str) -> bool | None:
    text = environment.get(variable, "").strip().lower()
    if text and text not in (*_ON, *_OFF):
        raise InputError(f"{variable} is {text[:40]!r}; it must be 1 or 0")
    return text in _ON if text else None


def _seconds(environment: Mapping[str, str], variable: str) -> float | None:
    text = environment.get(variable, "").strip()
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise InputError(f"{variable} is {text[:40]!r}; it must be a number of seconds")
    return seconds
