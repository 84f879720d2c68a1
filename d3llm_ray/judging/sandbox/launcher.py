"""What starts a program: makes the namespaces, the jail and the limits, then becomes the interpreter.

A script of its own, run by a bare `python -I -S`: it imports nothing of the package. Its one argument is JSON, a
`run.Job`. Its process makes the namespaces and waits for its parent to write the user map; its child is process 1 of
the new process namespace, whose end is the end of everything in there; that one's child becomes the program. A failure
is written to the file descriptor `setup`, which the program does not inherit.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any, NoReturn

# linux/sched.h: user, mount, process, network, IPC, host name and control group namespaces
NAMESPACES = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000 | 0x02000000
BIND, RECURSIVE, PRIVATE, NOSUID, NODEV = 4096, 16384, 1 << 18, 2, 4
DETACH = 2
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
READ_ONLY, READ_ONLY_DEVICE = 1 | 2 | 4, 1 | 2  # MOUNT_ATTR_RDONLY, _NOSUID, _NODEV
PDEATHSIG, SECCOMP, CAPBSET_DROP, NO_NEW_PRIVS = 1, 22, 24, 38
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
NEW_ROOT = "/tmp"  # where the jail is built, in a mount namespace of its own
SCRATCH = "/scratch"  # in the jail
SIGXCPU_CODE = 128 + signal.SIGXCPU

LIBC = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> None:
    """A function of libc, whose failure is an `OSError` that names it."""
    if getattr(LIBC, name)(*arguments) < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [text and text.encode() for text in (source, target, kind)]
    call("mount", *encoded, ctypes.c_ulong(flags), options and options.encode())


def set_attributes(path: str, attributes: int, flags: int) -> None:
    """mount_setattr(2), Linux 5.12: of a mount and of those below it, which a remount leaves as they were."""
    values = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    arguments = (MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, ctypes.byref(values), ctypes.sizeof(values))
    call("syscall", *(ctypes.c_long(each) if isinstance(each, int) else each for each in arguments))


def build_jail(job: dict[str, Any]) -> None:
    """A root folder of what Python needs, read-only, and a scratch folder in memory; nothing else is left to see.

    It ends in a `chroot` below the new root, because the kernel makes no user namespace for one who is in a chroot.
    """
    mount("none", "/", None, RECURSIVE | PRIVATE)
    sources = {path: os.open(path, os.O_PATH) for path in [*job["visible"], *DEVICES] if os.path.exists(path)}
    # What is a link on this machine, such as /lib, is the same link in the jail.
    links = {path: os.readlink(path) for path in job["visible"] if os.path.islink(path)}
    mount("none", NEW_ROOT, "tmpfs", NOSUID | NODEV, "size=1m,nr_inodes=1k,mode=755")
    jail = f"{NEW_ROOT}/jail"
    os.mkdir(jail)
    for path, source in sources.items():
        target = jail + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if path in links:
            os.symlink(links[path], target)
            continue
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        mount(f"/proc/self/fd/{source}", target, None, BIND | RECURSIVE)
        set_attributes(target, READ_ONLY_DEVICE if path in DEVICES else READ_ONLY, AT_RECURSIVE)
        os.close(source)
    for path in job["hidden"]:
        if os.path.isdir(jail + path):
            mount("none", jail + path, "tmpfs", NOSUID | NODEV, "size=4k,nr_inodes=1,mode=755")
    os.makedirs(jail + SCRATCH, exist_ok=True)
    options = f"size={job['scratch_bytes']},nr_inodes={job['scratch_files']},mode=1777"
    mount("none", jail + SCRATCH, "tmpfs", NOSUID | NODEV, options)
    set_attributes(NEW_ROOT, READ_ONLY, 0)
    os.chdir(NEW_ROOT)
    call("syscall", ctypes.c_long(job["pivot_root"]), b".", b".")
    call("umount2", b".", DETACH)
    os.chroot("/jail")
    os.chdir(SCRATCH)
    call("sethostname", b"sandbox", 7)


def give_up_rights(uid: int) -> None:
    """No capability, none to be had by an `execve`, and on a machine's root account another user."""
    for capability in range(64):
        if LIBC.prctl(CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break  # beyond this kernel's last one
    if os.getuid() != uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    empty = (ctypes.c_uint32 * 6)()
    call("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), empty)


def set_limits(limits: dict[str, int]) -> None:
    for name, value in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def filter_system_calls(rows: bytes) -> None:
    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("rows", ctypes.c_char_p))

    program = Program(len(rows) // 8, rows)
    call("prctl", SECCOMP, ctypes.c_ulong(2), ctypes.byref(program), ctypes.c_ulong(0), ctypes.c_ulong(0))


def die_with_parent(parent: int | None) -> None:
    call("prctl", PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def become_program(job: dict[str, Any]) -> NoReturn:
    """The last step, in the process that the program gets: nothing of the launcher is left behind it."""
    os.setsid()
    if job["is_protected"]:
        give_up_rights(job["uid"])
    else:
        os.chdir(job["scratch"])
    call("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)
    for number in [*range(1, signal.SIGRTMIN), *range(signal.SIGRTMIN, signal.SIGRTMAX + 1)]:
        if number not in (signal.SIGKILL, signal.SIGSTOP, 32, 33):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.set_inheritable(job["report"], True)
    set_limits(job["limits"])
    if job["is_protected"]:
        filter_system_calls(bytes.fromhex(job["filter"]))
    os.execve(job["argv"][0], job["argv"], job["environment"])


def exit_code(child: int, cpu_limit: int) -> int:
    """Wait for a child; as a shell says it: its exit status, or 128 + the signal (SIGXCPU for too much CPU time)."""
    _, status, usage = os.wait4(child, 0)
    if os.WIFEXITED(status):
        return os.WEXITSTATUS(status)
    is_over = os.WTERMSIG(status) == signal.SIGKILL and usage.ru_utime + usage.ru_stime >= cpu_limit - 0.05
    return SIGXCPU_CODE if is_over else 128 + os.WTERMSIG(status)


def supervise(job: dict[str, Any]) -> int:
    """Start the program as a child, as process 1 of the namespace; the exit code of its end."""
    # A handler would let the program's signals reach process 1; without one the kernel drops them.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    program = os.fork()
    if not program:
        guarded(job, become_program)
    for descriptor in (0, 1, 2, job["report"], job["setup"]):
        os.close(descriptor)
    return exit_code(program, job["limits"]["RLIMIT_CPU"])


def guarded(job: dict[str, Any], work: Any) -> NoReturn:
    """Do the work of a process and end it; what fails is told to the parent."""
    code = 1
    try:
        code = work(job)
    except BaseException as error:
        os.write(job["setup"], f"{type(error).__name__}: {error}".encode()[:1000])
    finally:
        os._exit(code)


def launch(job: dict[str, Any]) -> int:
    die_with_parent(job["parent"])
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.set_inheritable(job["setup"], False)
    if not job["is_protected"]:
        return supervise(job)
    call("unshare", NAMESPACES)
    os.write(job["setup"], b"m")
    if os.read(0, 1) != b"m":
        return 1
    build_jail(job)
    if not (first := os.fork()):
        die_with_parent(None)
        guarded(job, supervise)
    for descriptor in (0, 1, 2, job["report"], job["setup"]):
        os.close(descriptor)
    return exit_code(first, job["limits"]["RLIMIT_CPU"])


if __name__ == "__main__":
    description = json.loads(sys.argv[1])
    guarded(description, launch)
