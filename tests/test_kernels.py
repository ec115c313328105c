"""Kernels that are forked from one process: they run, share what is imported, and end."""

import os
import subprocess
import sys
import time

import psutil
import pytest
from tiny import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux only"),
]
SERVER = """
import subprocess, sys
from pathlib import Path
from ramslib.explorer import kernels
with kernels.listen(Path(sys.argv[1])) as line, subprocess.Popen(["sleep", "600"]) as server:
    print("ready", flush=True)
    kernels.fork_kernels(line, server)
"""
CODE = "import os, sys; print(os.getpid(), 'torch' in sys.modules, os.environ['COLOR'])"


@pytest.fixture
def server(tmp_path):
    """A fork server, and JUPYTER_PATH as Voila has it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLOR": "blue"}
    command = [sys.executable, "-c", SERVER, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process
        for each in psutil.Process(process.pid).children(recursive=True):
            each.kill()
        process.kill()


def test_kernels_share_what_is_imported_and_end_with_their_stand_in(server, tmp_path, monkeypatch):
    from jupyter_client.manager import start_new_kernel

    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    kernels, pids = [start_new_kernel(startup_timeout=120) for _ in range(2)], []
    for _, client in kernels:
        said = []
        client.execute_interactive(CODE, 60, output_hook=lambda m, s=said: s.append(m["content"]))
        text = "".join(content.get("text", "") for content in said)
        pid, *rest = text.split()
        assert rest == ["True", "blue"]
        memory = psutil.Process(int(pid)).memory_full_info()
        assert memory.uss < 0.3 * memory.rss, "most is shared"
        pids.append(int(pid))
        client.stop_channels()
    assert psutil.Process(pids[0]).ppid() == server.pid and pids[0] != pids[1]
    kernels[0][0].shutdown_kernel()  # asks
    kernels[1][0].shutdown_kernel(now=True)  # kills the stand-in
    deadline = time.monotonic() + 20
    while any(map(psutil.pid_exists, pids)):
        assert time.monotonic() < deadline, "a kernel outlives its stand-in"
        time.sleep(0.1)
