"""``fastpair`` and ``python`` for the blocks of pages: forks of a process that has imported all.

Imports are most of what a short command costs, and the pages hold dozens. A fork gets the caller's
arguments, folder, environment and streams, and runs what the command runs. How commands start by
themselves is tested elsewhere (``test_cli.py``).
"""

import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

CALLER = """#!{python} -IS
import json, os, socket, sys
to = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
to.connect({address!r})
asked = [{name!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]
socket.send_fds(to, [json.dumps(asked).encode() + b"\\0"], [0, 1, 2])
sys.exit(int(to.recv(8) or b"70"))
"""
"""The program that a block calls; what it asks for ends with a zero."""


IMPORTED = [
    "h5py",
    "hdf5plugin",
    "matplotlib.figure",
    "pyarrow.csv",
    "pyarrow.parquet",
    "scipy.cluster.hierarchy",
    "sklearn.datasets",
    "sklearn.decomposition",
    "sklearn.feature_extraction.text",
    "sklearn.metrics",
    "sklearn.model_selection",
    "fastpair.comparison",
    "fastpair.estimator",
    "fastpair.functions",
    "fastpair.id_jobs",
    "fastpair.jobs.all_pairs",
    "fastpair.jobs.folding",
    "fastpair.jobs.learning",
    "fastpair.jobs.measuring",
    "fastpair.jobs.scoring",
    "fastpair.training",
]
"""What commands and blocks import."""


class Preloaded:
    """The commands ``python`` and ``fastpair`` in `folder`, until `close` or the maker's end."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True, parents=True)
        # The address of a socket has little room; a folder of tests may have a long name.
        address = f"\0fastpair-pages-{os.getpid()}-{id(self)}"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address)
        listener.listen()
        self.folder = folder
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(listener.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
        )
        listener.close()
        for name in ("python", "fastpair"):
            text = CALLER.format(python=sys.executable, address=address, name=name)
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def close(self) -> None:
        """End the process that waits."""
        self._server.stdin.close()
        self._server.wait()


def serve(listener: socket.socket) -> None:
    """Fork for each caller, until standard input is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them here
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        caller, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            code = 70
            try:
                code = answer(caller)
            finally:
                caller.send(str(code).encode())
                os._exit(code)
        caller.close()


def answer(caller: socket.socket) -> int:
    """Do what a caller asks for, in its place; return the exit code."""
    text, streams, _, _ = socket.recv_fds(caller, 1 << 20, 3)
    while not text.endswith(b"\0"):
        text += caller.recv(1 << 20)
    name, words, folder, environment = json.loads(text[:-1])
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    try:
        if name == "fastpair":
            sys.argv = ["fastpair", *words]
            main()
        else:
            sys.argv, sys.path[0] = words, folder
            runpy.run_path(words[0], run_name="__main__")
        code: object = 0
    except SystemExit as ending:
        code = ending.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code if isinstance(code, int) else int(code is not None)


if __name__ == "__main__":
    from fastpair.cli import main, use_wide_matrix_products

    use_wide_matrix_products()  # as the command does before it imports NumPy
    for module in IMPORTED:
        importlib.import_module(module)
    serve(socket.socket(fileno=int(sys.argv[1])))
