"""Kernels of the app's pages that share what they import.

A page's kernel is forked from one process that has imported everything and computed nothing, so
that a further page costs what it changes, not a further copy of torch. Voila starts a small process
in its place, which names its connection file to the fork server and lives as long as the kernel;
if it is killed, the kernel ends. Linux only: elsewhere each kernel is a process of its own.
"""

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

MODULES = ("ipykernel.kernelapp", "ramslib.explorer.page", "matplotlib_inline.backend_inline")
STAND_IN = """
import signal, socket, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
with socket.socket(socket.AF_UNIX) as line:
    line.connect(sys.argv[1])
    line.sendall(sys.argv[2].encode() + b"\\n")
    line.recv(1)  # returns when the kernel has ended
"""


def listen(folder: Path) -> socket.socket:
    """The fork server's socket in a folder; kernels of this process and its children ask there."""
    line = socket.socket(socket.AF_UNIX)
    line.bind(address := str(folder / "kernels.sock"))
    line.listen()
    argv = [sys.executable, "-I", "-S", "-c", STAND_IN, address, "{connection_file}"]
    spec = {"argv": argv, "display_name": "Python 3", "language": "python"}
    place = folder / "kernels" / "python3"
    place.mkdir(parents=True)
    (place / "kernel.json").write_text(json.dumps(spec))
    places = str(folder), os.environ.get("JUPYTER_PATH")
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, places))
    return line


def fork_kernels(line: socket.socket, server: subprocess.Popen) -> None:
    """Fork a kernel for each stand-in that calls, until the server ends."""
    for name in MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or collecting garbage would touch, and copy, what is shared
    line.settimeout(0.5)
    kernels: set[int] = set()
    while server.poll() is None:
        kernels -= {pid for pid in kernels if os.waitpid(pid, os.WNOHANG)[0]}
        try:
            caller, _ = line.accept()
        except TimeoutError:
            continue
        with caller:
            if (pid := os.fork()) == 0:
                try:
                    line.close()
                    _be_a_kernel(caller)
                finally:
                    os._exit(0)  # never back into the server's code
            kernels.add(pid)


def _be_a_kernel(caller: socket.socket) -> None:
    """Run as the kernel of a stand-in, and end when it does."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    os.environ["JPY_PARENT_PID"] = str(os.getppid())  # it ends, too, when the fork server does
    caller.settimeout(None)
    connection = caller.makefile().readline().strip()

    def end_with_the_stand_in() -> None:
        caller.recv(1)
        os._exit(1)

    threading.Thread(target=end_with_the_stand_in, daemon=True).start()
    importlib.import_module(MODULES[0]).launch_new_instance(argv=["-f", connection])
