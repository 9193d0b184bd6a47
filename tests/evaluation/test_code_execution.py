"""What programs can do in the sandbox, and what not."""

import functools
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from cheaper.errors import UserError
from cheaper.evaluation import code_execution
from cheaper.evaluation.code_execution import Run, execute, passes

NOBODY = 65534


@pytest.fixture(autouse=True, params=["the caller", "nobody"])
def caller(request, monkeypatch):
    """Whoever runs the tests, and where that is root also somebody who is not."""
    if request.param == "nobody" and os.getuid() == 0:
        become = functools.partial(subprocess.run, user=NOBODY, group=NOBODY, extra_groups=[])
        monkeypatch.setattr(code_execution.subprocess, "run", become)
        monkeypatch.setattr(code_execution.os, "getuid", lambda: NOBODY)
        monkeypatch.setattr(code_execution.sys, "executable", "/usr/bin/python3")  # root's own may be in root's home
        monkeypatch.setattr(code_execution.sys, "base_prefix", "/usr")
    try:
        execute("")
    except UserError as error:
        pytest.skip(str(error))


def test_a_program_runs_once_for_each_input_until_one_fails():
    program = "text = input()\nassert text != 'bad'\nprint(text * 2)"
    assert execute(program, ["a", "b"]) == [Run(0, "aa\n"), Run(0, "bb\n")]
    assert execute(program, ["a", "bad", "b"]) == [Run(0, "aa\n"), Run(1, "")]


@pytest.mark.parametrize(
    ("program", "right"),
    [
        ("def f(): return 2\nassert f() == 2", True),
        ("def f(): return 3\nassert f() == 2", False),
        ("def f(:", False),
        ("raise SystemExit(0)", False),
        ("import os\nos._exit(0)", False),
        ("import threading\nthread = threading.Thread(target=print)\nthread.start()\nthread.join()", True),
    ],
)
def test_only_a_program_that_gets_past_its_assertions_passes(program, right):
    assert passes(program) == right


def test_an_endless_loop_is_stopped():
    assert execute("while True: pass", seconds=0.3) == [Run(None, "")]


def test_memory_is_limited():
    assert execute("memory = b'x' * (200 << 20)\nprint(1)", memory=100 << 20)[0].status == 1
    assert execute("memory = b'x' * (200 << 20)\nprint(1)", memory=400 << 20) == [Run(0, "1\n")]


def test_there_is_no_network():
    program = "import socket\ntry:\n  socket.create_connection(('1.1.1.1', 53), 1)\nexcept OSError as e: print(e.errno)"
    assert execute(program) == [Run(0, "101\n")]  # ENETUNREACH: there is not even a route


def test_only_the_empty_folder_is_written_to(tmp_path):
    tried = [str(tmp_path / "new"), "/etc/new", f"{os.getcwd()}/new", os.path.expanduser("~/new")]
    program = f"for name in {tried}:\n  try: open(name, 'w')\n  except OSError as error: print(error.errno)"
    (run,) = execute(program)
    assert set(run.output.split()) <= {"2", "13", "30"}  # not there, not allowed, read-only
    assert len(run.output.split()) == len(tried)
    assert not any(map(os.path.exists, tried))
    inside = "import os\nprint(os.listdir())\nopen('x', 'w').write('1')\nprint(open('x').read())"
    assert execute(inside) == [Run(0, "[]\n1\n")]


def test_files_are_limited():
    many = "with open('x', 'wb') as file:\n  for _ in range(100): file.write(bytes(1 << 20))"
    assert execute(many)[0].status != 0
    assert execute("files = [open('/dev/null') for _ in range(100)]")[0].status == 1
    assert len(execute("while True: print('x' * 1000)")[0].output) <= 16 << 20


def test_the_environment_and_the_home_and_the_checkout_are_hidden(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "secret").write_text("told")
    hidden = [f"{tmp_path}/secret", __file__, "/etc/passwd", f"/proc/{os.getpid()}/cmdline"]
    seen = f"print([path for path in {hidden} if os.path.exists(path)], os.environ.get('SECRET'))"
    assert execute(f"import os\n{seen}") == [Run(0, "[] None\n")]


def programs_left() -> list[psutil.Process]:
    return [one for one in psutil.process_iter(["cmdline"]) if "/tmp/program.py" in (one.info["cmdline"] or ())]


def test_processes_are_limited_and_none_is_left():
    forks = "while os.fork() or time.sleep(60) or True: pass"
    program = f"import os, time\ntry:\n  {forks}\nexcept OSError as error: print(error.errno)"
    (run,) = execute(program, seconds=5)
    assert run == Run(0, "11\n")  # EAGAIN
    assert not programs_left()


def test_a_fork_bomb_ends():
    assert execute("import os\nwhile True: os.fork()", seconds=1)[0].status != 0
    assert not programs_left()


def test_each_sandbox_has_processes_of_its_own():
    program = "import threading, time\nthreading.Thread(target=time.sleep, args=[4]).start()\nprint(1)"
    with ThreadPoolExecutor(40) as threads:
        runs = list(threads.map(lambda _: execute(program, seconds=60), range(40)))
    assert runs == [[Run(0, "1\n")]] * 40


def test_signals_stay_in_the_sandbox():
    with subprocess.Popen(["sleep", "60"], user=NOBODY if os.geteuid() == 0 else None) as bystander:
        assert execute("import os\nos.kill(0, 15)") == [Run(-15, "")]
        assert bystander.poll() is None
        bystander.kill()
    program = "import os\nfor signal in range(1, 32):\n  try: os.kill(1, signal)\n  except PermissionError: pass"
    assert execute(program) == [Run(0, "")]


def test_a_program_that_breaks_its_sandbox_has_failed():
    program = "import resource\nresource.prlimit(1, resource.RLIMIT_NOFILE, (0, 0))"
    assert execute(program, ["", ""]) == [Run(1, "")]


def test_a_program_has_no_privileges():
    remount, unshare = "libc.mount(b'none', b'/', None, 32 | 4096, None)", "libc.unshare(0x20000)"
    assert execute(f"import ctypes\nlibc = ctypes.CDLL(None)\nprint({remount}, {unshare})") == [Run(0, "-1 -1\n")]


def test_a_machine_without_a_sandbox_is_told_in_one_line(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="there is no unshare"):
        execute("print(1)")
    refused = subprocess.CompletedProcess([], 1, "", "unshare: unshare failed: Operation not permitted\n")
    monkeypatch.setattr(code_execution.subprocess, "run", lambda *_, **__: refused)
    with pytest.raises(UserError, match=r"makes no sandbox for programs .*Operation not permitted"):
        execute("print(1)")
