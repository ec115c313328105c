"""Forks of one process: they share what is imported, and pass for processes of their own."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

import psutil
import pytest
from tiny import ROOT, draw_photos, same_run, tiny_config

from ramslib.explorer.page import _write_kernel_spec
from ramslib.runs.folder import read_metrics
from ramslib.training import forks
from ramslib.training.launch import command, overrides, start

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
CODE = "import os, sys; print(os.getpid(), 'torch' in sys.modules, os.environ['COLOR'])"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("COLOR", "blue")


@pytest.fixture(scope="module")
def server():
    """A fork server; stand-ins ask it within this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        with forks.forking():
            yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return draw_photos(tmp_path_factory.mktemp("photos"))


def gone(pid, seconds=20):
    """Whether a process ends in time."""
    deadline = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def run_forked(*arguments, **options):
    """Run ``python -m ramslib`` by a fork."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | options
    return subprocess.Popen(forks.stand_in(command(arguments)), **options)


def test_kernels_share_what_is_imported_and_end_with_their_stand_in(server, tmp_path, monkeypatch):
    from jupyter_client.manager import start_new_kernel

    monkeypatch.setenv("JUPYTER_PATH", "")
    _write_kernel_spec(tmp_path)
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
    assert pids[0] != pids[1]
    manager, client = kernels[0]
    shown = []
    code = "import matplotlib.pyplot as plt; plt.plot([1, 2]);"
    client.execute_interactive(code, 60, output_hook=lambda m: shown.append(m["content"]))
    assert any("image/png" in content.get("data", {}) for content in shown)
    client.execute("import time; time.sleep(600)")
    time.sleep(1)
    manager.interrupt_kernel()
    assert client.get_shell_msg(timeout=30)["content"]["ename"] == "KeyboardInterrupt"
    manager.shutdown_kernel()  # asks
    kernels[1][0].shutdown_kernel(now=True)  # kills the stand-in
    assert all(map(gone, pids)), "a kernel outlives its stand-in"
    for _, client in kernels:
        client.stop_channels()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_forked_training_is_that_of_a_process_of_its_own(
    server, photos, tmp_path, processes, monkeypatch
):
    config = tiny_config(photos)
    start(tmp_path / "fork", ["train", "--run", tmp_path / "fork", *overrides(config)],
          processes).watch()  # fmt: skip
    monkeypatch.delenv(forks.ADDRESS)
    start(tmp_path / "own", ["train", "--run", tmp_path / "own", *overrides(config)],
          processes).watch()  # fmt: skip
    same_run(tmp_path / "fork", tmp_path / "own")
    logs = [(tmp_path / name / "output.log").read_text() for name in ("fork", "own")]
    said = [
        [line for line in log.splitlines() if "bird" in line or "epoch" in line] for log in logs
    ]
    assert [len(lines) for lines in said] == [len(said[1])] * 2 and said[1]


def test_a_stop_reaches_the_fork_and_its_exit_code_comes_back(server, photos, tmp_path):
    config, run = tiny_config(photos, epochs=10_000), tmp_path / "run"
    job = start(run, ["train", "--run", run, *overrides(config)], processes=2)
    while read_metrics(run).empty:
        assert job.is_running(), job.output()
        time.sleep(0.1)
    job.stop()
    assert "stopped as asked" in job.output() and (run / "last.safetensors").exists()
    wrong = run_forked("train", "--run", run, "epochs=zero")
    assert "cannot read" in wrong.communicate(timeout=60)[0] and wrong.returncode == 2
    right = run_forked("--help", cwd=tmp_path)
    assert "predict" in right.communicate(timeout=60)[0] and right.returncode == 0


def test_one_ends_when_the_other_is_killed(server, photos, tmp_path):
    config = tiny_config(photos, epochs=10_000)

    def begin(name):
        process = run_forked("train", "--run", tmp_path / name, *overrides(config))
        while read_metrics(tmp_path / name).empty:
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        (fork,) = (
            each.pid
            for each in psutil.process_iter()
            if each.pid != process.pid and str(tmp_path / name / ".lock") in opened_by(each)
        )
        return process, fork

    stand_in, fork = begin("one")
    stand_in.kill()
    assert gone(fork), "it would train for nobody"
    stand_in, fork = begin("two")
    os.kill(fork, signal.SIGKILL)
    assert stand_in.wait(timeout=20) == -signal.SIGKILL


def opened_by(process):
    """Paths of the files that a process has open."""
    try:
        return [file.path for file in process.open_files()]
    except psutil.Error:
        return []


@pytest.mark.parametrize("threads", ["many", "0", "2,1"])
def test_a_number_of_threads_that_is_none_is_ignored(server, threads):
    process = run_forked("--help", env=os.environ | {"OMP_NUM_THREADS": threads})
    assert "predict" in process.communicate(timeout=60)[0] and process.returncode == 0


def test_without_its_server_a_stand_in_is_the_process(monkeypatch):
    monkeypatch.delenv(forks.ADDRESS, raising=False)
    with forks.forking():
        waiting = run_forked("--help")
        children = psutil.Process().children()
        servers = [child for child in children if "forks.serve" in " ".join(child.cmdline())]
        max(servers, key=psutil.Process.create_time).kill()  # while it imports
        for process in (waiting, run_forked("--help")):
            assert "predict" in process.communicate(timeout=60)[0] and process.returncode == 0


def test_a_server_that_cannot_fork_goes_on(monkeypatch):
    """Where memory or process numbers have run out, the app's pages that are open go on."""
    monkeypatch.delenv(forks.ADDRESS, raising=False)
    monkeypatch.setattr(forks, "IMPORTED", ())
    monkeypatch.setattr(multiprocessing.context.ForkProcess, "start", _fail)
    with forks.listening() as line:
        process = run_forked("--help")
        forks.fork_for_callers(line, lambda: process.poll() is None)
        assert "predict" in process.communicate(timeout=60)[0] and process.returncode == 0


@pytest.mark.parametrize("said", [b"", b'+[["ramslib", "--help"], "/", {}]\n'])
def test_a_stand_in_that_is_killed_at_once_leaves_no_traceback(monkeypatch, capfd, said):
    monkeypatch.delenv(forks.ADDRESS, raising=False)
    monkeypatch.setattr(forks, "IMPORTED", ())
    with forks.listening() as line, socket.socket(socket.AF_UNIX) as stand_in:
        stand_in.connect(os.environ[forks.ADDRESS])
        stand_in.sendall(said)
        stand_in.close()
        deadline = time.monotonic() + 2
        forks.fork_for_callers(line, lambda: time.monotonic() < deadline)
        assert not multiprocessing.active_children()
    assert capfd.readouterr().err == ""


def _fail(*args):
    raise BlockingIOError("Resource temporarily unavailable")


def test_a_server_ends_with_its_starter_however_early():
    code = "import os; from ramslib.training.forks import forking"
    code += "\nwith forking(): os.kill(os.getpid(), 9)"
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    starter.communicate(timeout=60)  # returns when the server, too, has closed the pipe


def test_where_no_socket_can_be_processes_start_as_ever(monkeypatch, tmp_path):
    monkeypatch.delenv(forks.ADDRESS, raising=False)
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with forks.forking():
        assert forks.stand_in(command([])) == command([])
