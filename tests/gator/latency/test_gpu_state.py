"""What NVML says of a GPU; NVML stands in here, as no GPU does."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gator.latency import gpu_state
from gator.latency.gpu_state import GpuState, GpuWatch

CUDA = torch.device("cuda")


class NVMLError(Exception):
    """As pynvml's."""


class Nvml:
    """A driver that answers from a table; what is not in it is not supported."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, reasons: list[int], **answers: Any) -> None:
        self.reasons, self.answers = iter(reasons), answers

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "GPU-1234":
            raise NVMLError(uuid)
        return uuid

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def nvmlDeviceGetClockInfo(self, handle: str, clock: int) -> int:
        return {1: self.answers.get("sm_mhz", 1980), 2: 2619}[clock]

    def __getattr__(self, name: str) -> Any:
        def answer(*_: Any) -> Any:
            if name in self.answers:
                return self.answers[name]
            if name == self.answers.get("reasons_are"):
                return next(self.reasons)
            raise NVMLError(f"{name}: not supported")

        return answer


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(nvml: object, uuid: str = "1234") -> None:
        monkeypatch.setattr(gpu_state, "pynvml", nvml)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=uuid))

    return install


@pytest.mark.parametrize(
    "asked", ["nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"]
)
def test_what_slowed_any_repeat_is_kept(driver: Any, asked: str) -> None:
    """Also by a driver that knows the reasons by their older name."""
    idle, capped, hot = 0x1, 0x4, 0x40
    processes = [SimpleNamespace(pid=7001), SimpleNamespace(pid=7002)]  # of the host: none has this process's number
    driver(
        Nvml(
            [capped, hot, idle],
            reasons_are=asked,
            nvmlDeviceGetPowerUsage=310_500,
            nvmlDeviceGetTemperature=51,
            nvmlDeviceGetComputeRunningProcesses=processes,
        )
    )
    watch = GpuWatch(CUDA)
    for _ in range(3):
        watch.look()
    assert watch.state() == GpuState(
        driver="580.65.06",
        sm_mhz=1980,
        memory_mhz=2619,
        power_w=310.5,
        temperature_c=51,
        slowed_by=("power cap", "hardware thermal slowdown"),
        num_others=1,
    )


def test_what_the_driver_does_not_tell_is_none(driver: Any) -> None:
    driver(Nvml([]))
    watch = GpuWatch(CUDA)
    watch.look()
    state = watch.state()
    assert state is not None
    assert (state.power_w, state.temperature_c, state.slowed_by, state.num_others) == (None, None, (), 0)


def test_a_device_that_nvml_does_not_know_has_no_state(driver: Any) -> None:
    driver(Nvml([]), uuid="of-another")
    watch = GpuWatch(CUDA)
    watch.look()
    assert watch.state() is None


@pytest.mark.parametrize(
    ("sm_mhz", "reasons", "slowed_by"),
    [(1790, 0x0, ()), (1780, 0x0, ("low clock",)), (345, 0x1, ("low clock",)), (1200, 0x2, ())],
    ids=["above 90 %", "below", "idle", "set by the user"],
)
def test_a_clock_that_has_not_risen_is_noted(driver: Any, sm_mhz: int, reasons: int, slowed_by: tuple) -> None:
    asked = "nvmlDeviceGetCurrentClocksEventReasons"
    driver(Nvml([reasons], reasons_are=asked, sm_mhz=sm_mhz, nvmlDeviceGetMaxClockInfo=1980))
    watch = GpuWatch(CUDA)
    watch.look()
    state = watch.state()
    assert state is not None
    assert state.slowed_by == slowed_by


def test_without_nvml_there_is_no_state(driver: Any) -> None:
    driver(None)
    watch = GpuWatch(CUDA)
    watch.look()
    assert watch.state() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_driver_names_itself() -> None:
    state = GpuWatch(CUDA).state()
    assert state is not None
    assert state.driver.split(".")[0].isdecimal()
