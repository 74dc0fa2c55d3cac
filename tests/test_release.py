"""Archives of a release: equal files give equal bytes, whoever packs them, and nothing is lost."""

import importlib.util
import io
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

BACKEND = Path(__file__).parents[1] / "build_backend" / "reproducible.py"

pytest.importorskip("setuptools")
pytestmark = pytest.mark.skipif(not BACKEND.exists(), reason="the sources are not beside the tests")

FILES = {"p-1/a.py": b"a = 1\n", "p-1/b/c.py": b"", "p-1/run.sh": b"#!/bin/sh\n"}

circumstances = st.fixed_dictionaries(
    {
        "order": st.permutations(sorted(FILES)),
        "umask": st.sampled_from([0o000, 0o022, 0o027, 0o077]),
        "owner": st.integers(0, 60000),
        "time": st.integers(400_000_000, 2_000_000_000),
    }
)


@pytest.fixture(scope="module")
def backend():
    spec = importlib.util.spec_from_file_location("reproducible", BACKEND)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mode_of(name, umask):
    return (0o777 if name.endswith(".sh") else 0o666) & ~umask


def sdist(path, order, umask, owner, time):
    with tarfile.open(path, "w:gz") as archive:
        folder = tarfile.TarInfo("p-1")
        folder.type, folder.mtime = tarfile.DIRTYPE, time
        archive.addfile(folder)
        for name in order:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode, entry.mtime = len(FILES[name]), mode_of(name, umask), time
            entry.uid = entry.gid = owner
            entry.uname = f"user{owner}"
            archive.addfile(entry, io.BytesIO(FILES[name]))


def wheel(path, order, umask, owner, time):
    with zipfile.ZipFile(path, "w") as archive:
        for name in order:
            entry = zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0))
            entry.external_attr = (0o100000 | mode_of(name, umask)) << 16
            archive.writestr(entry, FILES[name])


@given(one=circumstances, other=circumstances)
def test_an_sdist_says_nothing_of_who_packed_it(backend, tmp_path_factory, one, other):
    folder = tmp_path_factory.mktemp("sdist")
    for name, how in (("one.tar.gz", one), ("other.tar.gz", other)):
        sdist(folder / name, **how)
        backend._rewrite_sdist(folder / name, 1_000_000_000)
    assert (folder / "one.tar.gz").read_bytes() == (folder / "other.tar.gz").read_bytes()
    with tarfile.open(folder / "one.tar.gz") as archive:
        entries = archive.getmembers()
        assert {one.name: archive.extractfile(one).read() for one in entries} == FILES
        assert {one.mode for one in entries if one.name.endswith(".py")} == {0o644}
        assert {one.mode for one in entries if one.name.endswith(".sh")} == {0o755}
        assert {(one.uid, one.gid, one.uname, one.mtime) for one in entries} == {(0, 0, "", 10**9)}


@given(one=circumstances, other=circumstances)
def test_a_wheel_says_nothing_of_who_packed_it(backend, tmp_path_factory, one, other):
    folder = tmp_path_factory.mktemp("wheel")
    for name, how in (("one.whl", one), ("other.whl", other)):
        wheel(folder / name, **how)
        backend._rewrite_wheel(folder / name)
    assert (folder / "one.whl").read_bytes() == (folder / "other.whl").read_bytes()
    with zipfile.ZipFile(folder / "one.whl") as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == FILES
        modes = {one.filename: one.external_attr >> 16 & 0o777 for one in archive.infolist()}
    assert modes == {name: 0o755 if name.endswith(".sh") else 0o644 for name in FILES}
