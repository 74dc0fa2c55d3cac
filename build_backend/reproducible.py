"""The build backend: that of setuptools, but equal sources give archives of equal bytes.

setuptools takes the times of a wheel from SOURCE_DATE_EPOCH, but the modes of its files from the
umask, and all that an sdist says of its files from the file system. Here, files have the mode 644
(executables 755), belong to nobody, are in the order of their names, and have one time.
"""

import gzip
import io
import os
import tarfile
import zipfile
from pathlib import Path

from setuptools.build_meta import *  # noqa: F403
from setuptools.build_meta import build_sdist as _build_sdist
from setuptools.build_meta import build_wheel as _build_wheel

LEAST_TIME = 315532800
"""The first second of 1980, before which a zip archive has no times."""


def _time():
    return max(LEAST_TIME, int(os.environ.get("SOURCE_DATE_EPOCH", LEAST_TIME)))


def build_sdist(sdist_directory, config_settings=None):
    """Build an sdist, see PEP 517."""
    name = _build_sdist(sdist_directory, config_settings)
    _rewrite_sdist(Path(sdist_directory) / name, _time())
    return name


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """Build a wheel, see PEP 517."""
    os.environ.setdefault("SOURCE_DATE_EPOCH", str(LEAST_TIME))
    name = _build_wheel(wheel_directory, config_settings, metadata_directory)
    _rewrite_wheel(Path(wheel_directory) / name)
    return name


def _mode(mode):
    return 0o755 if mode & 0o100 else 0o644


def _rewrite_sdist(path, time):
    archive = io.BytesIO()
    with (
        tarfile.open(path) as old,
        tarfile.open(fileobj=archive, mode="w", format=tarfile.GNU_FORMAT) as new,
    ):
        for entry in sorted((one for one in old if one.isfile()), key=lambda one: one.name):
            kept = tarfile.TarInfo(entry.name)
            kept.size, kept.mode, kept.mtime = entry.size, _mode(entry.mode), time
            new.addfile(kept, old.extractfile(entry))
    with path.open("wb") as file, gzip.GzipFile("", "wb", mtime=time, fileobj=file) as packed:
        packed.write(archive.getvalue())


def _rewrite_wheel(path):
    with zipfile.ZipFile(path) as old:
        entries = [(entry, old.read(entry)) for entry in old.infolist()]
    # the record comes last, as the format of wheels recommends
    entries.sort(key=lambda one: (one[0].filename.endswith(".dist-info/RECORD"), one[0].filename))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry, data in entries:
            kept = zipfile.ZipInfo(entry.filename, entry.date_time)
            kept.external_attr = (0o100000 | _mode(entry.external_attr >> 16)) << 16
            kept.compress_type = zipfile.ZIP_DEFLATED
            new.writestr(kept, data)
