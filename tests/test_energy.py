"""Energy: counters are read where the system shows them, around their end, and missed in words."""

import ctypes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpair.energy import Counter, EnergyMeter, cpu_counters, gpu_counter


def zone(folder, name, called, energy, most=1000):
    path = folder / name
    path.mkdir()
    (path / "name").write_text(called + "\n")
    (path / "max_energy_range_uj").write_text(f"{most}\n")
    if energy is not None:
        (path / "energy_uj").write_text(f"{energy}\n")
    return path


@pytest.fixture
def powercap(tmp_path):
    """Two packages; the first counts its memory apart; what lies in a package is shown as well."""
    zone(tmp_path, "intel-rapl:0", "package-0", 990)
    zone(tmp_path, "intel-rapl:0:0", "core", 7)
    zone(tmp_path, "intel-rapl:0:1", "dram", 10)
    zone(tmp_path, "intel-rapl:1", "package-1", 0)
    zone(tmp_path, "intel-rapl:2", "psys", 5)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 990)
    return tmp_path


def test_packages_and_their_memory_are_counted_once(powercap):
    counters, note = cpu_counters(powercap)
    assert [one.name for one in counters] == ["package-0", "package-0 dram", "package-1"]
    assert note == ""
    assert [one.read() for one in counters] == [990, 10, 0]


def test_a_counter_that_began_again_is_counted_on(powercap):
    meter = EnergyMeter(cpu_counters(powercap)[0])
    before = meter.now()
    (powercap / "intel-rapl:0" / "energy_uj").write_text("40\n")
    (powercap / "intel-rapl:1" / "energy_uj").write_text("200\n")
    assert meter.since(before) == pytest.approx((50 + 0 + 200) * 1e-6)


@given(most=st.integers(2, 10**12), start=st.integers(0), used=st.integers(0))
def test_less_than_a_round_is_counted_exactly(most, start, used):
    start, used = start % most, used % most
    counter = Counter("any", lambda: 0, most)
    assert counter.between(start, (start + used) % most) == pytest.approx(used / 1e6)


def test_a_counter_that_only_root_may_read_is_said(powercap):
    (powercap / "intel-rapl:1" / "energy_uj").unlink()
    (powercap / "intel-rapl:1" / "energy_uj").mkdir()  # root may read any file
    counters, note = cpu_counters(powercap)
    assert [one.name for one in counters] == ["package-0", "package-0 dram"]
    assert note.endswith("intel-rapl:1/energy_uj cannot be read")


@pytest.mark.parametrize("there", [True, False])
def test_a_system_without_counters_is_said(tmp_path, there):
    folder = tmp_path if there else tmp_path / "none"
    assert cpu_counters(folder)[0] == []
    assert "not shown by this system" in cpu_counters(folder)[1]
    meter = EnergyMeter([])
    assert meter.now() is None
    assert meter.since(None) is None


def test_a_counter_that_vanishes_gives_nothing(powercap):
    meter = EnergyMeter(cpu_counters(powercap)[0])
    before = meter.now()
    (powercap / "intel-rapl:1" / "energy_uj").unlink()
    assert meter.since(before) is None
    assert EnergyMeter([Counter("reset", iter([5, 3]).__next__)]).since([9]) is None


class Library:
    """What stands for NVML and for CUDA's driver; `codes` are what its functions return."""

    def __init__(self, **codes):
        self.codes, self.millijoules, self.asked = codes, 1500, []

    def __getattr__(self, name):
        def call(*arguments):
            if name == "cuDeviceGetPCIBusId":
                arguments[0].value = b"0000:0B:00.0"
            if name == "nvmlDeviceGetHandleByPciBusId_v2":
                self.asked.append(arguments[0].value)
            if name == "nvmlDeviceGetTotalEnergyConsumption":
                place = ctypes.cast(arguments[1], ctypes.POINTER(ctypes.c_ulonglong))
                place[0] = self.millijoules
            return self.codes.get(name, 0)

        return call


def test_a_gpu_is_found_by_its_place_and_counted_in_millijoules():
    library = Library()
    counter, note = gpu_counter(3, library, Library())
    assert (counter.name, note) == ("gpu:3", "")
    assert library.asked == [b"0000:0B:00.0"]
    meter = EnergyMeter([counter])
    before = meter.now()
    library.millijoules += 2500
    assert meter.since(before) == 2.5


@pytest.mark.parametrize(
    "name",
    ["nvmlInit_v2", "nvmlDeviceGetHandleByPciBusId_v2", "nvmlDeviceGetTotalEnergyConsumption"],
)
def test_a_gpu_that_does_not_count_is_said(name):
    counter, note = gpu_counter(0, Library(**{name: 3}), Library())
    assert counter is None
    assert "gpu:0 is not shown" in note
    assert "code 3" in note


def test_a_machine_without_nvml_is_said(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", missing)
    assert "libnvidia-ml" in gpu_counter(0)[1]
