"""What compute and communication cost: linear weights, data sheets, or measured curves.

A calibration turns "so many tokens" into "so much time". The cost model asks it for one curve per device
kind (time of one expert against its tokens) and one per tier (time of an exchange against the bytes that
the busiest device receives); it knows nothing of placements.
"""

from placement.calibration.curve import PiecewiseLinear
from placement.calibration.data_sheet import KERNEL_BANDWIDTH_EFFICIENCY, DataSheetCalibration
from placement.calibration.linear import LinearCalibration
from placement.calibration.machine import Machine
from placement.calibration.measured import ExpertTimes, MeasuredCalibration
from placement.calibration.protocol import Calibration
from placement.calibration.reading import calibration_from_dict, read_calibration

__all__ = [
    "KERNEL_BANDWIDTH_EFFICIENCY",
    "Calibration",
    "DataSheetCalibration",
    "ExpertTimes",
    "LinearCalibration",
    "Machine",
    "MeasuredCalibration",
    "PiecewiseLinear",
    "calibration_from_dict",
    "read_calibration",
]
