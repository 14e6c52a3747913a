"""Kinds of accelerator: speed, memory and links, with presets from data sheets and measurements.

Units: FLOP/s (dense bf16), bytes, bytes per second per direction. The table below keeps the units of its
sources (TFLOP/s, GiB, TB/s, GB/s, Gb/s) so that it can be read against them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from placement._suggest import did_you_mean
from placement.errors import InputError

__all__ = ["DEFAULT_MATMUL_EFFICIENCY", "DEVICE_KINDS", "DeviceKind", "device_kind"]

DEFAULT_MATMUL_EFFICIENCY = 0.75
"""Achieved share of peak FLOP/s where no measurement is known.

Measured figures lie between 0.51 (MI300X) and 0.87 (A100); most are 0.73 to 0.80.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceKind:
    """One kind of accelerator.

    Parameters
    ----------
    name
        What topologies call it.
    peak_flops
        Dense bf16 peak, FLOP/s (fp16 where the device has no bf16).
    measured_flops
        Achieved by large matrix products, FLOP/s; None where not measured (see `achieved_flops`).
    memory_bytes
        Device memory.
    memory_bandwidth
        Bytes per second.
    scale_up_bandwidth
        Into one device from its peers in the node, bytes per second and direction.
    nic_bandwidth
        One device's share of its node's network adapters, bytes per second and direction.

    Raises
    ------
    InputError
        If the name is empty or a figure is not positive and finite.
    """

    name: str
    peak_flops: float
    measured_flops: float | None = None
    memory_bytes: int
    memory_bandwidth: float
    scale_up_bandwidth: float
    nic_bandwidth: float

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise InputError("a device kind needs a name")
        for name in ("peak_flops", "memory_bytes", "memory_bandwidth", "scale_up_bandwidth", "nic_bandwidth"):
            self._check_positive(name, getattr(self, name))
        if self.measured_flops is not None:
            self._check_positive("measured_flops", self.measured_flops)

    def _check_positive(self, name: str, value: float) -> None:
        if not (math.isfinite(value) and value > 0):
            raise InputError(
                f"{name} of device kind {self.name!r} is {value}; it must be positive and finite"
            )

    @property
    def achieved_flops(self) -> float:
        """Measured FLOP/s, or `DEFAULT_MATMUL_EFFICIENCY` of the peak where none was measured."""
        if self.measured_flops is not None:
            return self.measured_flops
        return self.peak_flops * DEFAULT_MATMUL_EFFICIENCY


class _Sheet(NamedTuple):
    """A row of the table, in the units of its sources."""

    peak_tflops: float
    measured_tflops: float | None
    memory_gib: int
    memory_tb_s: float
    scale_up_gb_s: float
    nic_gbit_s: float


# Peaks, memory and links: vendors' data sheets. Measured: maximum achievable matmul FLOP/s of
# github.com/stas00/ml-engineering (MAMF finder, bf16). Cards whose sheet gives "GB" carry that many GiB.
# NIC figures are what such nodes usually have per device: override nic_gbits for another build.
_SHEETS = {
    # fp16 figures: V100 and T4 have no bf16.
    "v100": _Sheet(125, None, 16, 0.90, 150, 100),
    "v100-32": _Sheet(125, None, 32, 0.90, 150, 100),
    # NVLink bridge between two cards.
    "a40": _Sheet(149.7, None, 48, 0.696, 56.25, 100),
    # No scale-up link: peers talk over PCIe, gen 4 x16 (31.5 GB/s) and gen 3 x16 (15.75 GB/s) per direction.
    "l40s": _Sheet(362, None, 48, 0.864, 31.5, 100),
    "t4": _Sheet(65, None, 16, 0.32, 15.75, 100),
    "a100": _Sheet(312, 271, 80, 2.039, 300, 200),
    "a100-40": _Sheet(312, 271, 40, 1.555, 300, 100),
    # Export variants: the same chip with NVLink cut to 400 GB/s (200 per direction).
    "a800": _Sheet(312, 271, 80, 2.039, 200, 200),
    "h100": _Sheet(989, 794.5, 80, 3.35, 450, 400),
    "h800": _Sheet(989, 794.5, 80, 3.35, 200, 400),
    "h200": _Sheet(989, 794.5, 141, 4.8, 450, 400),
    "b200": _Sheet(2250, 1745, 180, 7.7, 900, 400),
    # NVL72: 72 devices are one node of the shorthand (gb200:1x72); the NIC is for traffic between racks.
    "gb200": _Sheet(2500, 1822, 186, 8.0, 900, 400),
    # Seven links of 64 GB/s to seven peers: 448 GB/s into a device only when all peers send.
    "mi300x": _Sheet(1307, 668, 192, 5.3, 448, 400),
    # One graphics die of two; 4 adapters of 200 Gb/s serve the 8 dies of a node.
    "mi250x-gcd": _Sheet(191.5, None, 64, 1.638, 200, 100),
}

_ALIASES = {
    "v100-16": "v100",
    "a100-80": "a100",
    "h100-sxm": "h100",
    "gb200-nvl72": "gb200",
    "mi250x": "mi250x-gcd",
}


def _preset(name: str, sheet: _Sheet) -> DeviceKind:
    measured = sheet.measured_tflops
    return DeviceKind(
        name=name,
        peak_flops=sheet.peak_tflops * 1e12,
        measured_flops=None if measured is None else measured * 1e12,
        memory_bytes=sheet.memory_gib * 2**30,
        memory_bandwidth=sheet.memory_tb_s * 1e12,
        scale_up_bandwidth=sheet.scale_up_gb_s * 1e9,
        nic_bandwidth=sheet.nic_gbit_s * 1e9 / 8,
    )


DEVICE_KINDS: dict[str, DeviceKind] = {name: _preset(name, sheet) for name, sheet in _SHEETS.items()}
"""Preset kinds by name."""


def device_kind(name: str) -> DeviceKind:
    """Return a preset kind by name; case and ``_`` for ``-`` do not matter.

    Raises
    ------
    InputError
        If no preset has that name, with the nearest one.
    """
    key = name.strip().lower().replace("_", "-")
    key = _ALIASES.get(key, key)
    if key not in DEVICE_KINDS:
        raise InputError(f"unknown device kind {name!r}; {did_you_mean(key, DEVICE_KINDS)}")
    return DEVICE_KINDS[key]
