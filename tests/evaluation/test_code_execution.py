"""What programs can do in the sandbox, and what not."""

import os
import subprocess

import psutil
import pytest

from cheaper.errors import UserError
from cheaper.evaluation import code_execution
from cheaper.evaluation.code_execution import Run, check_sandbox, execute, passes


@pytest.fixture(scope="module", autouse=True)
def sandbox():
    try:
        check_sandbox()
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


def test_the_environment_and_the_home_are_hidden(monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    program = "import os\nprint(os.environ.get('SECRET'), os.listdir(os.path.expanduser('~')))"
    assert execute(program)[0].output in ("None []\n", "")  # or there is no home at all


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
