"""Kernels of CUDA C++ made into machine code for one device by NVRTC, and kept on the disk.

CuPy's own `RawModule` is of no use here: it puts ``-ftz=true`` behind the options that it is given,
the last one counts, and denormal numbers would be 0 on a GPU alone. So NVRTC gets exactly the
options of the contract, those that every variant is compiled with in the tests.
"""

from __future__ import annotations

import hashlib
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

_DIGEST = hashlib.sha256().digest_size


def load_module(cupy: Any, source: str, options: tuple[str, ...], capability: str) -> Any:
    """Return a module of the current device, compiled unless the disk has it.

    Parameters
    ----------
    cupy : the module CuPy.
    source : str
        CUDA C++ without includes.
    options : of NVRTC, without an architecture.
    capability : str
        That of the device, such as "90".

    Raises
    ------
    cupy.cuda.compiler.CompileException
        NVRTC refuses the source; the message is its log.
    """
    from fastpair.kernels.simd import cache_folder

    nvrtc, folder = cupy.cuda.nvrtc, cache_folder()
    given = (*options, _architecture(nvrtc, int(capability)))
    code, path = None, None
    if folder is not None:
        key = repr((source, given, nvrtc.getVersion()))
        path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"
        code = _read(path)
    if code is None:
        code = _compile(cupy, source, given)
        if path is not None:
            _write(path, code)
    module = cupy.cuda.Module()
    module.load(code)
    return module


def _architecture(nvrtc: Any, capability: int) -> str:
    """Return the option for a device: its machine code, or what its driver makes into that."""
    known = nvrtc.getSupportedArchs()
    if capability in known:
        return f"-arch=sm_{capability}"
    return f"-arch=compute_{max(number for number in known if number < capability)}"


def _compile(cupy: Any, source: str, options: tuple[str, ...]) -> bytes:
    nvrtc = cupy.cuda.nvrtc
    program = nvrtc.createProgram(source, "fastpair.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
        machine_code = options[-1].startswith("-arch=sm_")
        return bytes((nvrtc.getCUBIN if machine_code else nvrtc.getPTX)(program))
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program) or str(error)
        raise cupy.cuda.compiler.CompileException(log, source, "fastpair.cu", options) from error
    finally:
        nvrtc.destroyProgram(program)


def _read(path: Path) -> bytes | None:
    """Return code that lies on the disk; None where there is none, or where it is damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, code = data[:_DIGEST], data[_DIGEST:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    """Put code on the disk, whole or not at all; without room there it is compiled again."""
    partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        partial.write_bytes(hashlib.sha256(code).digest() + code)
        os.replace(partial, path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
