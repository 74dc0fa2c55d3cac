"""The state of a training that has not ended yet, in a file next to the model to come."""

from __future__ import annotations

import json
import os
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from fastpair.errors import FileError
from fastpair.staging import writing

SUFFIX = ".training"
"""What is appended to the name of a model while it is trained."""


class FileCheckpoint:
    """Keeps a `fastpair.training.Checkpoint` in ``MODEL.training``, arrays and JSON in one npz.

    Parameters
    ----------
    model : where the model shall stand.
    resume : whether a state that is there already is gone on from; else it is replaced.
    seconds : a state younger than this is not replaced by the next.
    """

    def __init__(self, model: Path, *, resume: bool = False, seconds: float = 2.0) -> None:
        self.path = model.with_name(model.name + SUFFIX)
        self.resume, self.seconds = resume, seconds
        self._saved = time.monotonic()

    def load(self) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """Return the state of the earlier training; None where there is none or none is wanted.

        Raises
        ------
        FileError : the file cannot be read as a state.
        """
        if not self.resume or not self.path.exists():
            return None
        try:
            with np.load(self.path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            return json.loads(arrays.pop("config").tobytes()), arrays
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
            raise FileError(
                f"{self.path} holds no state of a training: remove it and start without --resume"
            ) from error

    def save(self, config: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Replace the state by this one, at once or not at all."""
        if time.monotonic() - self._saved < self.seconds:
            return
        fresh = self.path.with_name(self.path.name + ".new")
        text = np.frombuffer(json.dumps(config).encode(), np.uint8)
        with writing(self.path):
            with open(fresh, "wb") as file:
                named: dict[str, Any] = {**arrays, "config": text}
                np.savez(file, **named)
            os.replace(fresh, self.path)
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Remove the state of a training that has ended."""
        self.path.unlink(missing_ok=True)
