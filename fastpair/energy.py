"""Energy: the counters of joules that a system shows, read before and after what is measured.

Processors: Linux's powercap folder, one zone a package and perhaps one for its memory. GPUs: NVML,
which comes with NVIDIA's driver. Many systems show none, or to root alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")

_BUS_ID = 32
"""Bytes that the name of a place on the PCI bus takes, at most."""


@dataclass(frozen=True)
class Counter:
    """A counter of energy that only rises, until it begins at 0 again.

    Parameters
    ----------
    name : what it counts, such as "package-0", "package-0 dram" or "gpu:0".
    read : returns microjoules; it may raise OSError.
    range : the greatest number of microjoules that it shows before it begins again; None: it
        never does.
    """

    name: str
    read: Callable[[], int]
    range: int | None = None

    def between(self, before: int, after: int) -> float:
        """Return the joules from one reading to a later one, which is less than a round later.

        A counter that went back without a range has been reset: OSError.
        """
        used = after - before
        if used < 0:
            if self.range is None:
                raise OSError(f"the counter {self.name} went back")
            used += self.range
        return used / 1e6


class EnergyMeter:
    """Some counters that are read together.

    Parameters
    ----------
    counters : none: every `since` is None.
    """

    def __init__(self, counters: Sequence[Counter]) -> None:
        self.counters = tuple(counters)

    @property
    def names(self) -> list[str]:
        """The names of the counters."""
        return [counter.name for counter in self.counters]

    def now(self) -> list[int] | None:
        """Read all counters; None if there are none, or one can no longer be read."""
        try:
            return [counter.read() for counter in self.counters] or None
        except (OSError, ValueError):
            return None

    def since(self, before: list[int] | None) -> float | None:
        """Return the joules since `now` gave `before`, of all counters together, or None."""
        after = self.now()
        if before is None or after is None:
            return None
        try:
            return sum(
                counter.between(*reading)
                for counter, *reading in zip(self.counters, before, after, strict=True)
            )
        except OSError:
            return None


# --- processors ----------------------------------------------------------------------------------


def cpu_counters(folder: Path | None = None) -> tuple[list[Counter], str]:
    """Return the counters of processors and their memory that can be read, and why some cannot.

    Parameters
    ----------
    folder : where powercap's zones are; default `POWERCAP`.

    Returns
    -------
    counters : one for each package, and one for its memory where that is counted apart.
    note : a sentence on what is not counted; empty if everything is.
    """
    folder = folder or POWERCAP
    counters, locked = [], []
    for zone in sorted(folder.glob("intel-rapl:*")):
        name = _zone_name(zone)
        if name is None:
            continue
        try:
            counter = _zone_counter(zone, name)
            counter.read()
        except (OSError, ValueError):
            locked.append(zone / "energy_uj")
        else:
            counters.append(counter)
    if locked:
        return counters, f"energy is not shown to this user: {locked[0]} cannot be read"
    if not counters:
        return [], f"energy is not shown by this system: {folder} has no zone of a processor"
    return counters, ""


def _zone_name(zone: Path) -> str | None:
    """Return what a zone counts, or None where another one counts it already."""
    try:
        name = (zone / "name").read_text().strip()
        if name.startswith("package"):
            return name
        if name == "dram":  # the other parts lie within the package, its memory does not
            return f"{(_package_of(zone) / 'name').read_text().strip()} dram"
    except OSError:
        pass
    return None


def _package_of(zone: Path) -> Path:
    """Return the zone that a part such as ``intel-rapl:0:2`` belongs to."""
    return zone.with_name(zone.name.rpartition(":")[0])


def _zone_counter(zone: Path, name: str) -> Counter:
    most = int((zone / "max_energy_range_uj").read_text())
    return Counter(name, lambda: int((zone / "energy_uj").read_text()), most)


# --- GPUs ----------------------------------------------------------------------------------------


def gpu_counter(number: int, library: Any = None, driver: Any = None) -> tuple[Counter | None, str]:
    """Return the counter of a GPU, by its number in CUDA, or None and why there is none.

    Parameters
    ----------
    library, driver : NVML and CUDA's driver; default those of the system.
    """
    missing = f"energy of gpu:{number} is not shown"
    try:
        library = library or ctypes.CDLL("libnvidia-ml.so.1")
        driver = driver or ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None, f"{missing}: there is no libnvidia-ml.so.1, which comes with the driver"
    device, name = ctypes.c_int(0), ctypes.create_string_buffer(_BUS_ID)
    handle = ctypes.c_void_p()
    # the numbers of NVML are not those of CUDA: both know the place on the bus
    code = (
        driver.cuDeviceGet(ctypes.byref(device), number)
        or driver.cuDeviceGetPCIBusId(name, _BUS_ID, device)
        or library.nvmlInit_v2()
        or library.nvmlDeviceGetHandleByPciBusId_v2(name, ctypes.byref(handle))
    )
    if code:
        return None, f"{missing}: NVML does not find it (code {code})"

    def read() -> int:
        millijoules = ctypes.c_ulonglong(0)
        refused = library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
        if refused:
            raise OSError(f"NVML code {refused}")
        return 1000 * millijoules.value

    try:
        read()
    except OSError as error:
        return None, f"{missing}: {error}, as of GPUs older than Volta"
    return Counter(f"gpu:{number}", read), ""
