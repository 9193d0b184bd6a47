"""Runs a program on inputs where it can do no harm. ``code_execution`` starts this file in namespaces of its own.

It needs nothing but the standard library. It is the first process of its namespace: when it ends, all others do, and
signals from there do not reach it unless it has a handler.
"""

import contextlib
import ctypes
import functools
import json
import os
import resource
import signal
import subprocess
import sys

SHOWN = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/alternatives", "/etc/ld.so.cache")  # libraries are there
SHOWN += tuple(f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom"))
ROOT = "/tmp"  # where the new one is made
PYTHON = "/run/python"  # the interpreter's new place: the old one may be in somebody's home
PROCESSES, FILES, FILE_BYTES, FOLDER_BYTES = 32, 64, 16 << 20, 64 << 20
NOBODY = 65534
MS_BIND, MS_REC, MNT_DETACH, CLONE_NEWUSER = 4096, 16384, 2, 0x10000000
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
PR_SET_NO_NEW_PRIVS, PR_CAPBSET_DROP, CAPABILITIES = 38, 24, 64

libc = ctypes.CDLL(None, use_errno=True)


def main(prefix, executable, is_root, seconds, memory):
    """Reads the program and its inputs as JSON.

    Prints a line at each start of the program, and then for each input the status, None after time, and the output.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler would let the program end this process
    os.umask(0o022)
    job = json.load(sys.stdin)
    isolate(prefix)
    program = "/tmp/program.py"
    with open(program, "w", encoding="utf-8") as file:
        file.write(job["program"])
    results = []
    for number, text in enumerate(job["inputs"]):
        results.append(run([f"{PYTHON}/{executable}", "-I", program], f"/tmp/{number}", text, is_root, seconds, memory))
        if results[-1]["status"] != 0:
            break
    json.dump(results, sys.stdout)


def isolate(prefix):
    """Leaves what Python needs, read-only, and an empty /tmp; nobody outside of the namespace sees that."""
    python = os.open(prefix, os.O_PATH)  # it may be where the new root is made
    mount("tmpfs", ROOT, "tmpfs")
    for path in SHOWN:
        show(path, ROOT + path)
    show(f"/proc/self/fd/{python}/.", ROOT + PYTHON)
    os.close(python)
    os.mkdir(f"{ROOT}/tmp")
    os.chdir(ROOT)
    check(libc.syscall(SYS_PIVOT_ROOT[os.uname().machine], b".", b"."))
    check(libc.umount2(b".", MNT_DETACH))  # the old root, which lies on the new one
    read_only = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    check(libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, read_only, ctypes.sizeof(read_only)))
    mount("tmpfs", "/tmp", "tmpfs", 0, f"size={FOLDER_BYTES}")


def show(path, place):
    """Makes a file, folder or link be at another place too."""
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), place)
    elif os.path.exists(path):
        os.mkdir(place) if os.path.isdir(path) else open(place, "w").close()
        mount(path, place, None, MS_BIND | MS_REC)


def mount(source, target, kind, flags=0, data=None):
    texts = [text.encode() if text else None for text in (source, target, kind)]
    check(libc.mount(*texts, flags, data.encode() if data else None))


def check(status):
    if status:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def run(command, folder, text, is_root, seconds, memory):
    os.mkdir(folder)
    os.chmod(folder, 0o777)
    text_file = functools.partial(open, mode="w+", encoding="utf-8", errors="replace")
    with text_file(f"{folder}.in") as source, text_file(f"{folder}.out") as output:
        source.write(text)
        source.seek(0)
        process = subprocess.Popen(
            command,
            stdin=source,
            stdout=output,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"LD_LIBRARY_PATH": f"{PYTHON}/lib"},
            preexec_fn=lambda: restrict(is_root, seconds, memory),
            start_new_session=True,  # signals to the program's group are to reach nobody else
        )
        print("started", flush=True)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)  # the program, and whatever it started
        output.seek(0)
        return {"status": status, "output": output.read()}


def restrict(is_root, seconds, memory):
    """Limits this process and those it will start, and gives up every privilege for good."""
    if is_root:  # whom no limit on processes holds
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        check(libc.unshare(CLONE_NEWUSER))  # or the processes of all sandboxes would count as one user's
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: FILES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: PROCESSES,
    }
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))
    for capability in range(CAPABILITIES):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


if __name__ == "__main__":
    prefix, executable, is_root, seconds, memory = sys.argv[1:]
    main(prefix, executable, is_root == "True", float(seconds), int(memory))
