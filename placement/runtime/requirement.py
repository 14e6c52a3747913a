"""Say in one line that the optional model packages are missing, before anything imports them."""

from __future__ import annotations

from importlib.util import find_spec

from placement.errors import InputError

__all__ = ["require_torch"]

_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers")


def require_torch() -> None:
    """Check that the packages of the `torch` extra are installed, without importing them.

    Raises
    ------
    InputError
        If one is missing; the message names it and the command that installs it.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise InputError(
            f"running a model needs {', '.join(missing)}; install with: pip install 'moe-placement[torch]'"
        )
