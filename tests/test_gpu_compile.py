"""Every GPU kernel compiles for real devices without a spill, and as its table says."""

import json
import os
import subprocess
import sys
from importlib import resources

import pytest
from compile_gpu import ARCHITECTURES, MOST_REGISTERS, REGISTERS, complaints, find_nvrtc, programs
from compile_gpu import __file__ as script


@pytest.mark.skipif(find_nvrtc() is None, reason="pip install nvidia-cuda-nvrtc to compile kernels")
def test_kernels_compile_as_the_table_says():
    done = subprocess.run(
        [sys.executable, script, "--quick"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_kernel_file_has_programs():
    kernels = {path.name for path in resources.files("fastpair.kernels").iterdir()}
    sources = {name for name in kernels if name.endswith(".cu")}
    assert {file for file, _ in programs()} == sources
    assert len(sources) >= 4


def test_the_table_knows_every_architecture_and_breaks_no_limit():
    for version, registers in json.loads(REGISTERS.read_text()).items():
        assert max(registers.values()) <= MOST_REGISTERS, version
        for architecture in ARCHITECTURES:
            assert any(name.startswith(architecture) for name in registers)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((8, 0, 0, 40), "stack frame"),
        ((0, 4, 0, 40), "spill stores"),
        ((0, 0, 4, 40), "spill stores"),
        ((0, 0, 0, 129), "at most 128"),
        ((0, 0, 0, 41), "the table says 40"),
    ],
)
def test_a_kernel_that_breaks_a_limit_is_told(numbers, message):
    assert list(complaints({"kernel": (0, 0, 0, 40)}, {"kernel": 40})) == []
    (found,) = complaints({"kernel": numbers}, {"kernel": 40})
    assert message in found
    assert "nothing compiles it" in next(iter(complaints({}, {"kernel": 40})))


def test_without_a_compiler_the_script_says_what_to_install(tmp_path):
    environment = {**os.environ, "FASTPAIR_NVRTC": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "pip install nvidia-cuda-nvrtc" in done.stderr
