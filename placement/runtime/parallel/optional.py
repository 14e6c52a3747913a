"""Triton kernels that torch code stands in for, where there is no Triton or they fail."""

from __future__ import annotations

import subprocess
import warnings
from importlib import import_module
from types import ModuleType

import torch

__all__ = ["OptionalKernels"]


class OptionalKernels:
    """A module of kernels, loaded when first asked for, used until one fails.

    Parameters
    ----------
    module
        Its full name. It says in ``FAILURES`` what else its kernels may raise where they cannot be built.
    purpose
        What the kernels are for, for the warning.
    """

    def __init__(self, module: str, purpose: str) -> None:
        self.failures: tuple[type[Exception], ...] = (RuntimeError, OSError, subprocess.SubprocessError)
        self._name, self._purpose = module, purpose
        self._module: ModuleType | None = None
        self._usable: bool | None = None

    @property
    def module(self) -> ModuleType:
        """The kernels; only where `load` says that there are any."""
        if self._module is None:
            raise RuntimeError(f"{self._name} is not loaded")
        return self._module

    def load(self) -> bool:
        """Whether there are kernels; the first call looks for them."""
        if self._usable is None:
            try:
                self._module = import_module(self._name)
                self.failures += self._module.FAILURES
                self._usable = True
            except (ImportError, OSError) as failure:
                self.give_up(failure)
        return bool(self._usable)

    def give_up(self, failure: BaseException) -> None:
        """Use torch from now on, and say so.

        Raises
        ------
        torch.OutOfMemoryError
            If that is the failure: torch would need no less memory.
        """
        if isinstance(failure, torch.OutOfMemoryError):
            raise failure
        self._usable = False
        warnings.warn(
            f"no Triton kernels for {self._purpose} ({type(failure).__name__}: {failure}); torch does it, "
            "which is slower",
            RuntimeWarning,
            stacklevel=2,
        )
