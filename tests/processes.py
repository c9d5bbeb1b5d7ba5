"""Processes that start at once: forked from one that has imported the libraries, as most of a short command's time goes
into importing torch and transformers.

`server(folder, "torch", "transformers")` imports them once, for all workers of a run of the tests, and gives what
stands for the interpreter in a command: `[*python, "-m", "aicompress", ...]` or `[*python, "-c", code, ...]`. It is a
small program that hands its arguments, folder, environment and standard streams to the server, passes signals on, and
ends as the fork ends. The package, too, may be among the modules: a fork that runs other code than its command, or the
command of another copy, imports it anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

PACKAGE = "aicompress"
PAUSE = 0.005  # seconds between two looks at a process that runs
CLIENT = """
import array, json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect(sys.argv[1])
streams = array.array("i", [0, 1, 2])
asked = json.dumps({"arguments": sys.argv[2:], "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
server.sendmsg([len(asked).to_bytes(8, "little")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
server.sendall(asked)
answers = server.makefile()
process = int(answers.readline())
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: os.kill(process, number))
status = int(answers.readline() or signal.SIGKILL)
if os.WIFSIGNALED(status):
    signal.signal(os.WTERMSIG(status), signal.SIG_DFL) if os.WTERMSIG(status) != signal.SIGKILL else None
    os.kill(os.getpid(), os.WTERMSIG(status))
os._exit(os.waitstatus_to_exitcode(status))
"""


def run_of_tests() -> int:
    """The process that the whole run of the tests ends with: its workers' parent, if it has workers."""
    return os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()


def shared(temporary: pytest.TempPathFactory, name: str) -> Path:
    """A folder that all workers of a run of the tests have."""
    own = temporary.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name
    folder.mkdir(exist_ok=True)
    return folder


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Wait until no other worker is inside, with this file as the lock."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def server(folder: Path, *modules: str) -> list[str]:
    """What stands for the interpreter in a command; the server is started where no other worker has."""
    address, ready = folder / "server", folder / "ready"
    with one_at_a_time(folder / "lock"):
        if not ready.exists():
            with (folder / "log").open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, __file__, str(address), str(run_of_tests()), *modules],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=log,
                )
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n", (folder / "log").read_text(errors="replace")
            ready.touch()
    return [sys.executable, "-I", "-S", "-c", CLIENT, str(address)]


def serve(address: str, until: int, modules: list[str]) -> None:
    """Fork for every client, until another process has ended."""
    gc.disable()
    for name in modules:
        importlib.import_module(name)
    gc.freeze()  # so that the collector of a fork looks through none of it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a keeper
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen(16)
        os.write(1, b"ready\n")
        while lives(until):
            if not select.select([listening], [], [], 1)[0]:
                continue
            client, _ = listening.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listening.close()
                keep(client)
                os._exit(0)
            client.close()


def lives(process: int) -> bool:
    """Whether a process has not ended."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def keep(client: socket.socket) -> None:
    """Fork a client's process, tell the client how it ends, and kill it if the client goes."""
    head, streams, _, _ = socket.recv_fds(client, 8, 3)
    with client.makefile("rb") as received:
        asked = json.loads(received.read(int.from_bytes(head, "little")))
    process = os.fork()
    if process == 0:
        client.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os._exit(run(**asked))
    for stream in streams:
        os.close(stream)
    client.sendall(b"%d\n" % process)
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            with contextlib.suppress(BrokenPipeError):
                client.sendall(b"%d\n" % status)
            return
        if select.select([client], [], [], PAUSE)[0]:
            os.kill(process, signal.SIGKILL)


def is_own(module: str) -> bool:
    """Whether a module that a command names is the one that the server has imported, and no other copy of it."""
    spec = PathFinder.find_spec(module, sys.path)
    return module not in sys.modules or (spec is not None and spec.origin == sys.modules[module].__file__)


def run(arguments: list[str], folder: str, environment: dict[str, str]) -> int:
    """Do what the interpreter does with -m or -c, and flush; the exit code."""
    gc.enable()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a run of the tests in the background ignores it
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = ["", *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    option, given, *rest = arguments
    sys.argv = [option, *rest]
    if option != "-m" or not is_own(given):
        for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
            del sys.modules[name]
    code = 0
    try:
        if option == "-m":
            runpy.run_module(given, run_name="__main__", alter_sys=True)
        else:
            exec(compile(given, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return code


if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder
    serve(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
