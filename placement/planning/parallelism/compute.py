"""What computing one layer takes on one device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from placement.calibration import Calibration, PiecewiseLinear
from placement.devices import DeviceKind
from placement.errors import InputError
from placement.planning.parallelism.job import TrainingJob

__all__ = ["DeviceSpeed", "device_speed"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceSpeed:
    """Speed of the devices.

    Parameters
    ----------
    peak_flops
        FLOP/s that utilisation is told against.
    attention_flops
        FLOP/s achieved in attention, shared experts, dense layers and the head.
    expert_curve
        Seconds of one routed expert against its tokens, forward.
    """

    peak_flops: float
    attention_flops: float
    expert_curve: PiecewiseLinear

    def attention_s(self, job: TrainingJob, *, tokens: float) -> float:
        """Return the forward seconds of one attention layer."""
        flops = job.transformer.attention_flops(tokens=tokens, sequence_length=job.sequence_length)
        return flops / self.attention_flops

    def scores_s(self, job: TrainingJob, *, tokens: float) -> float:
        """Return the forward seconds of the attention scores alone."""
        shape = job.transformer
        flops = shape.attention_flops(tokens=tokens, sequence_length=job.sequence_length)
        return (flops - 2.0 * tokens * shape.attention_params) / self.attention_flops

    def matrices_s(self, num_params: float, *, tokens: float) -> float:
        """Return the forward seconds of weights that every token visits."""
        return 2.0 * num_params * tokens / self.attention_flops

    def experts_s(
        self, job: TrainingJob, *, pairs: float, experts_here: float, factor_L: FloatArray | float = 1.0
    ) -> FloatArray:
        """Return the forward seconds of the fullest device's routed experts.

        Parameters
        ----------
        pairs
            Token-expert pairs that a device receives where loads are balanced.
        experts_here
            Experts on the device.
        factor_L
            Load of the fullest device over the mean, for each layer.
        """
        return experts_here * self.expert_curve(pairs / experts_here * np.asarray(factor_L))


def device_speed(
    kind: DeviceKind,
    calibration: Calibration,
    job: TrainingJob,
    *,
    tensor: int = 1,
    attention_flops: float | None = None,
) -> DeviceSpeed:
    """Return the speed of a device kind on a model whose experts are split over `tensor` devices.

    Parameters
    ----------
    attention_flops
        Measured FLOP/s in attention; None for the kind's achieved FLOP/s.

    Raises
    ------
    InputError
        If the experts do not split so, or the calibration has no curve for them.
    """
    moe = job.transformer.moe
    if moe.expert_hidden_size % tensor:
        raise InputError(f"experts of width {moe.expert_hidden_size} do not split over {tensor} devices")
    split = replace(moe, expert_hidden_size=moe.expert_hidden_size // tensor)
    return DeviceSpeed(
        peak_flops=kind.peak_flops,
        attention_flops=kind.achieved_flops if attention_flops is None else attention_flops,
        expert_curve=calibration.expert_curve(kind, split),
    )
