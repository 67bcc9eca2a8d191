"""The state of a GPU during a measurement, from its driver: clocks, power, why clocks are held back, other processes.

NVML is queried while kernels run: for a GPU that has just become idle it reports "idle", whatever slowed the GPU a
millisecond before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

try:
    import pynvml  # of the package nvidia-ml-py; without it a measurement has no GpuState
except ModuleNotFoundError:
    pynvml = None

SLOWING_REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal limit",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""Bits of NVML's clocks event reasons. The others are harmless: idle, clocks set by an application, a display."""
LOW_CLOCK, LEAST_CLOCK = "low clock", 0.9
"""The streaming multiprocessors ran at less than this share of their highest clock, and not by a setting of the user."""
SET_BY_USER = 0x2


@dataclass(frozen=True, kw_only=True)
class GpuState:
    """A GPU during a measurement. None stands for what its driver does not report, as in MIG mode."""

    driver: str
    sm_mhz: int | None
    memory_mhz: int | None
    power_w: float | None
    temperature_c: int | None
    slowed_by: tuple[str, ...]
    """Names of SLOWING_REASONS that held at any repeat, and LOW_CLOCK."""
    num_others: int
    """Further processes with a context on it."""


class GpuWatch:
    """Samples the state of a GPU while it works."""

    def __init__(self, device: torch.device) -> None:
        self._handle = _handle(device)
        self._reasons = 0

    def look(self) -> None:
        """Record why the clocks are held back right now; takes microseconds, and no time of the GPU."""
        if self._handle is not None:
            self._reasons |= _asked(self._event_reasons) or 0

    def state(self) -> GpuState | None:
        """Return what was recorded, and the driver's report at the end; None without NVML."""
        if self._handle is None:
            return None
        power_mw = self._asked("nvmlDeviceGetPowerUsage")
        # In a container the driver knows processes by other numbers: one of those it lists is this process.
        processes = self._asked("nvmlDeviceGetComputeRunningProcesses") or []
        sm_mhz = self._asked("nvmlDeviceGetClockInfo", pynvml.NVML_CLOCK_SM)
        most_mhz = self._asked("nvmlDeviceGetMaxClockInfo", pynvml.NVML_CLOCK_SM)
        is_low = None not in (sm_mhz, most_mhz) and sm_mhz < LEAST_CLOCK * most_mhz and not self._reasons & SET_BY_USER
        slowed_by = [name for bit, name in SLOWING_REASONS.items() if self._reasons & bit]
        return GpuState(
            driver=str(_asked(pynvml.nvmlSystemGetDriverVersion)),
            sm_mhz=sm_mhz,
            memory_mhz=self._asked("nvmlDeviceGetClockInfo", pynvml.NVML_CLOCK_MEM),
            power_w=None if power_mw is None else power_mw / 1000,
            temperature_c=self._asked("nvmlDeviceGetTemperature", pynvml.NVML_TEMPERATURE_GPU),
            slowed_by=(*slowed_by, *[LOW_CLOCK] * is_low),
            num_others=max(0, len(processes) - 1),
        )

    def _asked(self, name: str, *arguments: Any) -> Any:
        return _asked(lambda: getattr(pynvml, name)(self._handle, *arguments))

    def _event_reasons(self) -> int:
        try:
            return int(pynvml.nvmlDeviceGetCurrentClocksEventReasons(self._handle))
        except pynvml.NVMLError:  # drivers before 535 have it under its older name
            return int(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle))


def _handle(device: torch.device) -> Any:
    """Return NVML's handle of a device; None without NVML."""
    if pynvml is None:
        return None
    uuid = torch.cuda.get_device_properties(device).uuid

    def find() -> Any:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")

    return _asked(find)


def _asked(ask: Callable[[], Any]) -> Any:
    """Return the driver's answer; None if it has none."""
    try:
        return ask()
    except pynvml.NVMLError:
        return None
