"""Runs a program on inputs where it can do no harm. ``code_execution`` starts this file in namespaces of its own.

It needs nothing but the standard library. It is the first process of its namespace: when it ends, all others do.
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

HIDDEN = ("/tmp", "/var/tmp", "/root", "/home", "/run", "/dev/shm")  # other people's files and sockets
PYTHON = "/run/python"  # the interpreter's new place: the old one may be in somebody's home
PROCESSES, FILES, FILE_BYTES, FOLDER_BYTES = 32, 64, 16 << 20, 64 << 20
NOBODY = 65534
MS_BIND, MS_REC = 4096, 16384
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
PR_SET_NO_NEW_PRIVS, PR_CAPBSET_DROP, CAPABILITIES = 38, 24, 64

libc = ctypes.CDLL(None, use_errno=True)


def main(prefix, executable, is_root, seconds, memory):
    """Reads the program and its inputs as JSON; prints for each input the status, None after time, and the output."""
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
    """Makes all files read-only, hides some, and leaves an empty /tmp; nobody outside of the namespace sees that."""
    folders = [folder for folder in HIDDEN if os.path.isdir(folder)]
    python = os.open(prefix, os.O_PATH)  # it may be in a hidden folder
    for folder in folders:
        mount("tmpfs", folder, "tmpfs")
    os.mkdir(PYTHON, 0o755)
    mount(f"/proc/self/fd/{python}", PYTHON, None, MS_BIND | MS_REC)
    os.close(python)
    read_only = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    check(libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, read_only, ctypes.sizeof(read_only)))
    mount("tmpfs", "/tmp", "tmpfs", 0, f"size={FOLDER_BYTES}")


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
        )
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
    if is_root:  # whom no limit on processes holds
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


if __name__ == "__main__":
    prefix, executable, is_root, seconds, memory = sys.argv[1:]
    main(prefix, executable, is_root == "True", float(seconds), int(memory))
