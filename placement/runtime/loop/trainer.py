"""A callback that keeps the placement of a model up to date while transformers' Trainer trains it."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from placement.errors import InputError
from placement.runtime.loop.loop import PlacementLoop
from placement.runtime.loop.seams import Counter, PlacementSource
from placement.runtime.parallel.model import ParallelModel

__all__ = ["PlacementCallback"]

_log = logging.getLogger(__name__)


class PlacementCallback(TrainerCallback):
    """Runs a `PlacementLoop` in one call of `Trainer.train`.

    Experts are kept out of DistributedDataParallel, which would overwrite them with those of rank 0 and
    average what has been summed already. Gradients are clipped here instead of by the Trainer, whose norm
    would leave out the experts of the other ranks: ``args.max_grad_norm`` is 0 while it trains, and the norm
    that is logged is that of all ranks. The Trainer's own checkpoints hold the experts of rank 0 alone:
    `placement.runtime.parallel.saving` writes whole ones.

    Parameters
    ----------
    parallel
        The model that the Trainer is given, with its experts spread over the ranks.
    source
        Where placements come from and windows go to; closed at the end of the training.
    every_steps, counter, version
        As for `PlacementLoop`. A step is one of the optimizer.
    options
        Further options of `PlacementLoop`.
    """

    def __init__(
        self,
        parallel: ParallelModel,
        source: PlacementSource,
        *,
        every_steps: int = 10,
        counter: Counter | None = None,
        version: int | None = None,
        **options: Any,
    ) -> None:
        self.loop: PlacementLoop | None = None
        """The loop, while it runs."""
        self._parallel, self._source = parallel, source
        self._options = {"every_steps": every_steps, "counter": counter, "version": version, **options}
        self._max_norm = 0.0
        self._norm: torch.Tensor | None = None
        # The Trainer wraps the model by itself; there is no other way to leave parameters out.
        wrapper: Any = DistributedDataParallel
        wrapper._set_params_and_buffers_to_ignore_for_model(
            parallel.model, list(parallel.expert_parameters())
        )

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **others: Any,
    ) -> None:
        """Begin; every rank waits for rank 0 here.

        Raises
        ------
        InputError
            If the Trainer has another model.
        """
        if model is None or not any(part is self._parallel.model for part in model.modules()):
            raise InputError("the Trainer has another model than the callback; give it parallel.model")
        self._max_norm, args.max_grad_norm = float(args.max_grad_norm or 0.0), 0.0
        if self._max_norm and state.is_world_process_zero:
            _log.warning(
                "gradients are clipped to a norm of %g over the experts of all ranks, not by the Trainer",
                self._max_norm,
            )
        # Accelerate wraps optimizers; what is inside has the parameters and their state.
        inner = getattr(optimizer, "optimizer", optimizer)
        self.loop = PlacementLoop(self._parallel, self._source, optimizer=inner, **self._options)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Clip gradients."""
        if self._max_norm:
            self._norm = self._parallel.clip_grad_norm_(self._max_norm)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Go on with the loop: the optimizer has stepped."""
        if self.loop is not None:
            self.loop.step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        """Have the norm logged that gradients were clipped by."""
        if self._norm is None or not logs or "grad_norm" not in logs:
            return
        norm = float(self._norm)
        logs["grad_norm"] = norm
        if state.log_history and "grad_norm" in state.log_history[-1]:
            state.log_history[-1]["grad_norm"] = norm

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """End."""
        args.max_grad_norm = self._max_norm
        loop, self.loop = self.loop, None
        if loop is not None:
            loop.close()
