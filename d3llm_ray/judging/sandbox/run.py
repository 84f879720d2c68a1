"""One program and its tests, run in the sandbox; and whether this machine has one."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from d3llm_ray.errors import InputError, WorkError, require
from d3llm_ray.judging.sandbox.pipes import Pipes
from d3llm_ray.judging.sandbox.system_calls import MACHINES, REFUSED, system_call_filter
from d3llm_ray.judging.sandbox.visible import hidden_paths, interpreter, visible_paths

ALLOW_UNSANDBOXED = "D3LLM_RAY_ALLOW_UNSANDBOXED_PROGRAMS"  # set to 1, programs run without protection where they must
LAUNCHER = Path(__file__).with_name("launcher.py")
HARNESS = Path(__file__).with_name("harness.py")
NOBODY = 65534
SETUP_S = 60.0  # to start an interpreter and make the namespaces, on a machine that is busy
MEGABYTE = 1 << 20
# A program that says why this machine's sandbox does not hold; silent where it does.
SELF_TEST = """
import os
try:
    if os.fork() == 0:
        os._exit(0)
    raise SystemExit("a program may start processes")
except OSError:
    pass
for path in ("/etc/passwd", "/proc/self/status", {checkout!r}):
    if os.path.exists(path):
        raise SystemExit("a program sees " + path)
try:
    open("/file", "w")
    raise SystemExit("a program may write to the root folder")
except OSError:
    open("file", "w").close()
"""


@dataclass(frozen=True)
class Limits:
    """What a program may use. Seconds of processor time (whole ones) and of the clock; megabytes of address space and
    of files; files; bytes of output that are kept, the rest is dropped."""

    cpu_s: int = 1
    wall_s: float = 10.0
    memory_mb: int = 256
    scratch_mb: int = 16
    scratch_files: int = 256
    output_bytes: int = 16 * 1024

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require(value > 0, name, value, "a positive number")

    def resources(self) -> dict[str, int]:
        """The limits of one process (getrlimit(2)); it is the only one, for it may start no others."""
        return {
            "RLIMIT_AS": self.memory_mb * MEGABYTE,
            "RLIMIT_CPU": self.cpu_s,
            # Files in memory are none of the address space: their number times their size is bounded with these two.
            "RLIMIT_FSIZE": self.scratch_mb * MEGABYTE // 2,
            "RLIMIT_NOFILE": 32,
            "RLIMIT_NPROC": 0,
            "RLIMIT_CORE": 0,
            "RLIMIT_MEMLOCK": 0,
            "RLIMIT_MSGQUEUE": 0,
            "RLIMIT_SIGPENDING": 64,
        }


@dataclass(frozen=True)
class ProgramRun:
    """What became of a program. `exit_code`: as a shell says it, 128 + the signal where one ended it, 128 + SIGXCPU for
    too much processor time; None where it was stopped at the wall limit. `output` is bytes of stdout and stderr."""

    passed: bool
    was_loaded: bool
    exit_code: int | None
    output: bytes
    dropped_bytes: int
    seconds: float


@dataclass(frozen=True)
class Job:
    """What the launcher is told."""

    argv: list[str]
    report: int
    setup: int
    scratch: str
    limits: dict[str, int]
    scratch_bytes: int
    scratch_files: int
    is_protected: bool
    environment: dict[str, str] = field(default_factory=lambda: {"PYTHONHASHSEED": "0"})  # a verdict repeats
    uid: int = NOBODY
    parent: int = field(default_factory=os.getpid)
    visible: list[str] = field(default_factory=visible_paths)
    hidden: list[str] = field(default_factory=hidden_paths)
    filter: str = field(default_factory=lambda: (system_call_filter() or b"").hex())
    pivot_root: int = field(default_factory=lambda: _call_number("pivot_root"))


def run_program(program: str, tests: str, limits: Limits | None = None) -> ProgramRun:
    """Run `program`, then `tests` in its namespace; passed where both came to their end.

    `InputError` where this machine has no sandbox and the user has not allowed to go without (`require_sandbox`).
    """
    require_sandbox()
    return _run(program, tests, limits or Limits(), is_protected=sandbox_reason() is None)


def require_sandbox() -> None:
    """`InputError` with the reason where programs cannot be run here: what a verb asks before it starts its work."""
    reason = sandbox_reason()
    if reason is not None and os.environ.get(ALLOW_UNSANDBOXED) != "1":
        raise InputError(
            f"sandbox: programs cannot be run safely on this machine: {reason}; accepted: a Linux with user namespaces "
            f"(kernel.unprivileged_userns_clone, user.max_user_namespaces; in a container, a security profile that "
            f"lets it make them), or {ALLOW_UNSANDBOXED}=1 to run them without protection"
        )


@lru_cache(maxsize=1)
def sandbox_reason() -> str | None:
    """Why programs cannot be run safely on this machine; None where they can. A program is run to find out."""
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} has no Linux namespaces"
    if platform.machine() not in MACHINES:
        return f"no filter of system calls for {platform.machine()}"
    try:
        test = SELF_TEST.format(checkout=str(Path(__file__).parent))
        run = _run(test, "", Limits(cpu_s=10, wall_s=SETUP_S), is_protected=True)
    except (OSError, WorkError) as error:
        return str(error)
    return None if run.passed else run.output.decode(errors="replace").strip() or f"exit code {run.exit_code}"


def available_cores() -> int:
    return len(os.sched_getaffinity(0))


def _run(program: str, tests: str, limits: Limits, *, is_protected: bool) -> ProgramRun:
    token = secrets.token_hex(16).encode()
    python = interpreter()
    with contextlib.ExitStack() as stack:
        pipes = stack.enter_context(Pipes(limits.output_bytes))
        job = Job(
            argv=[python, "-s", "-S", "-P", "-B", "-c", HARNESS.read_text(encoding="utf-8"), str(pipes.report_end)],
            report=pipes.report_end,
            setup=pipes.setup_end,
            scratch="" if is_protected else stack.enter_context(tempfile.TemporaryDirectory(prefix="d3llm-program-")),
            limits=limits.resources(),
            scratch_bytes=limits.scratch_mb * MEGABYTE,
            scratch_files=limits.scratch_files,
            is_protected=is_protected,
        )
        process = subprocess.Popen(
            [python, "-I", "-S", "-B", str(LAUNCHER), json.dumps(vars(job))],
            stdin=pipes.input_end,
            stdout=pipes.output_end,
            stderr=pipes.output_end,
            pass_fds=(pipes.report_end, pipes.setup_end),
            env={},
            cwd="/",
            start_new_session=True,
        )
        try:
            pipes.close_far_ends()
            if is_protected:
                if pipes.read_setup(SETUP_S, 1) == b"m":
                    _map_users(process.pid)
                pipes.send(b"m")
            failure = pipes.read_setup(SETUP_S)
            if failure:
                raise WorkError(f"sandbox: {failure.decode(errors='replace')}")
            started = time.monotonic()
            pipes.send(_message(program))
            ended = pipes.converse(started + limits.wall_s, _message(tests) + _message(token.decode()))
            seconds = time.monotonic() - started
        finally:
            with contextlib.suppress(ProcessLookupError):
                if "ended" not in locals() or not ended:
                    os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        return ProgramRun(
            passed=pipes.report == b"+" + token,
            was_loaded=pipes.report.startswith(b"+"),
            exit_code=code if ended else None,
            output=bytes(pipes.output),
            dropped_bytes=pipes.dropped,
            seconds=seconds,
        )


def _message(text: str) -> bytes:
    encoded = text.encode("utf-8", errors="replace")
    return b"%d\n%s" % (len(encoded), encoded)


def _map_users(pid: int) -> None:
    """Give the launcher's user namespace its users: the caller as the one who runs the program. The machine's root has
    no limit of processes and owns its files, so its programs get the user nobody."""
    folder = Path(f"/proc/{pid}")
    if os.geteuid() == 0:
        users = groups = f"0 0 1\n{NOBODY} {NOBODY} 1"
    else:
        (folder / "setgroups").write_text("deny")
        users, groups = f"{NOBODY} {os.geteuid()} 1", f"{NOBODY} {os.getegid()} 1"
    (folder / "gid_map").write_text(groups)
    (folder / "uid_map").write_text(users)


def _call_number(name: str) -> int:
    machine = platform.machine()
    return REFUSED[name][list(MACHINES).index(machine)] if machine in MACHINES else -1
