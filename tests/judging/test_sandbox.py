"""Hostile programs harm nothing. Each is bounded by itself, too, should the sandbox fail to hold it."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from d3llm_ray.errors import InputError
from d3llm_ray.judging import FinalAnswer, ProgramJudge, require_ready
from d3llm_ray.judging.sandbox import run as sandbox
from d3llm_ray.judging.sandbox.run import ProgramLimits, ProgramRun, run_program, sandbox_reason
from d3llm_ray.judging.sandbox.system_calls import REFUSED, system_call_filter

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sandbox_reason() is not None, reason=f"no sandbox: {sandbox_reason()}")

REFUSED_CALL = """
def refused(call, *arguments, **named):
    try:
        call(*arguments, **named)
    except OSError:
        return True
    return False
"""


def holds(program: str, limits: ProgramLimits | None = None) -> ProgramRun:
    """A program that checks from inside that it can do no harm."""
    run = run_program(REFUSED_CALL + program, "", limits)
    assert run.passed, run.output.decode()
    return run


def processes_with(marker: bytes, file: str = "cmdline") -> list[str]:
    """Processes of this machine that say so of themselves, within a second of the end of a program."""
    found = []
    for _ in range(20):
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if marker in (folder / file).read_bytes():
                    found.append(folder.name)
            except OSError:
                continue
        if not found:
            break
        time.sleep(0.05)
    return found


def test_a_program_starts_no_processes_and_no_threads() -> None:
    holds("""
import os, subprocess, sys, threading
assert all(refused(os.fork) for _ in range(100))
assert refused(subprocess.run, [sys.executable, "-c", "pass"])
assert refused(os.posix_spawn, sys.executable, [sys.executable, "-c", "pass"], {})
assert refused(os.system, "true") or os.system("true") != 0
try:
    threading.Thread(target=print).start()
    raise SystemExit("a thread")
except RuntimeError:
    pass
""")


def test_a_grandchild_ends_with_its_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it would be without a limit of processes: the namespace's process 1 takes all others with it."""
    resources = ProgramLimits().resources()
    monkeypatch.setattr(ProgramLimits, "resources", lambda self: {**resources, "RLIMIT_NPROC": 64})
    name = f"left{os.getpid()}"
    run = holds(f"""
import ctypes, os, signal, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ctypes.CDLL(None).prctl(15, b"{name}", 0, 0, 0)
        time.sleep(20)
    os._exit(0)
os.wait()
time.sleep(0.1)
""")
    assert run.seconds < 10 and not processes_with(name.encode(), "comm")


def test_nothing_of_the_user_is_to_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    monkeypatch.setenv("SECRET_OF_THE_USER", "secret")
    run = holds(f"""
import os
assert not os.environ and refused(open, "/proc/self/environ") and os.getcwd() == "/scratch" and not os.listdir()
for path in ("/etc/passwd", "/proc", "/sys", "/dev/shm", "/var", "/run", "/home", "/tmp", "/usr/bin/env",
             {str(Path.home() / ".bashrc")!r}, {str(ROOT)!r}, {str(secret)!r}, {sys.prefix + "/pyvenv.cfg"!r}):
    assert not os.path.exists(path), path
    os.symlink(path, "link")
    assert refused(os.listdir, "link") and refused(open, "link")
    os.unlink("link")
assert not os.path.exists("/scratch/../../" + {str(ROOT)!r})
import sysconfig
assert os.listdir(sysconfig.get_path("purelib")) == [] if os.path.exists(sysconfig.get_path("purelib")) else True
print(sorted(os.listdir("/")))
""")
    assert b"scratch" in run.output


def test_nothing_is_written_outside_the_scratch_folder() -> None:
    holds("""
import os, sys
folders = ["/", "/usr/lib", "/dev", os.path.dirname(sys.executable), os.path.dirname(os.__file__)]
assert all(refused(open, folder + "/file", "w") for folder in folders)
assert refused(os.chmod, os.__file__, 0o777) and refused(os.unlink, os.__file__) and refused(os.chroot, ".")
with open("file", "w") as file:
    file.write("kept")
assert open("file").read() == "kept"
""")
    holds("import os\nassert not os.listdir('.')")  # another program's scratch folder


def test_the_scratch_folder_is_small() -> None:
    holds(
        """
import os
written, part = 0, b"x" * (1 << 20)
for number in range(64):
    try:
        with open(str(number), "wb", buffering=0) as file:
            for _ in range(64):
                written += file.write(part)
    except OSError:
        pass
assert 0 < written <= 5 << 20, written
for number in range(64):
    if os.path.exists(str(number)):
        os.unlink(str(number))
made = 0
while made < 5000 and not refused(os.mkdir, f"folder{made}"):
    made += 1
assert made < 300, made
""",
        ProgramLimits(scratch_mb=4, cpu_s=5),
    )


def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        holds(f"""
import socket, urllib.request
assert refused(socket.create_connection, ("127.0.0.1", {port}), timeout=1)
assert refused(socket.getaddrinfo, "example.org", 80)
assert refused(urllib.request.urlopen, "http://127.0.0.1:{port}", timeout=1)
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_VSOCK, socket.AF_NETLINK, socket.AF_ALG):
    assert refused(socket.socket, family, socket.SOCK_STREAM), family
""")
        with pytest.raises(TimeoutError):
            server.accept()


def test_nobody_else_gets_a_signal() -> None:
    holds(f"""
import os, signal
for process in (1, -1, os.getppid(), {os.getpid()}, {os.getppid()}):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        try:
            os.kill(process, number)
        except OSError:
            pass
assert os.getpid() == 2
""")


def test_calls_of_libc_lead_nowhere() -> None:
    holds("""
import ctypes, platform
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x10000000) == -1 and libc.unshare(0) == -1
assert libc.mount(b"none", b"/scratch", b"tmpfs", 0, None) == -1
assert libc.memfd_create(b"memory", 0) == -1 and libc.shmget(0, 4096, 0o1600) == -1
assert libc.ptrace(16, 1, 0, 0) == -1 and libc.setuid(0) == -1
assert libc.fork() == -1
clone = {"x86_64": 56, "aarch64": 220}[platform.machine()]
for flags in (17, 0x10000011, 0x20000011):  # a process; in a user namespace; in a process namespace
    if (child := libc.syscall(clone, flags, 0, 0, 0, 0)) != -1:
        import os
        os._exit(child and 9)
""")


def test_another_program_cannot_take_its_place() -> None:
    run = run_program("import os, sys\nos.execv(sys.executable, [sys.executable, '-S', '-c', 'print(1)'])", "")
    assert not run.passed and run.exit_code == 0


def test_too_much_processor_time_ends_it() -> None:
    run = run_program(
        "import signal\nfor number in (15, 24, 2): signal.signal(number, signal.SIG_IGN)\nwhile True: pass",
        "",
        ProgramLimits(wall_s=60),
    )
    assert not run.passed and run.exit_code == 128 + 24
    assert not processes_with(f'"parent": {os.getpid()},'.encode())


def test_too_much_time_ends_it() -> None:
    program = "import signal, time\nsignal.pthread_sigmask(0, range(1, 32))\ntime.sleep(20)"
    run = run_program(program, "", ProgramLimits(wall_s=0.5))
    assert not run.passed and run.exit_code is None and run.seconds < 10
    assert not processes_with(f'"parent": {os.getpid()},'.encode())


def test_too_much_memory_ends_it() -> None:
    run = run_program("parts = []\nfor _ in range(1000):\n    parts.append(bytes(1 << 20))", "")
    assert not run.passed and b"MemoryError" in run.output
    holds("""
import mmap
parts = []
try:
    for _ in range(64):
        parts.append(mmap.mmap(-1, 8 << 20))
    raise SystemExit("512 MB")
except OSError:
    pass
""")


def test_output_is_bounded() -> None:
    run = run_program("print('x' * 100_000)", "assert True", ProgramLimits(output_bytes=1000))
    assert run.passed and run.output == b"x" * 1000 and run.dropped_bytes == 99_001
    run = run_program("import os\nfor _ in range(10_000): os.write(1, b'x' * 65536)", "", ProgramLimits(cpu_s=5))
    assert not run.passed and run.exit_code is None and run.dropped_bytes < 100e6


def test_a_deep_recursion_is_no_success() -> None:
    assert not run_program("def f(): return f()\nf()", "").passed
    endless = "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f([x]) or repr(x)\nf([])"
    assert not run_program(endless, "").passed


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nsys.exit(0)",
        "raise SystemExit",
        "import os\nos._exit(0)",
        "import os\ndef f(): os._exit(0)",
        "def f(): raise SystemExit(0)",
        "import builtins\nclass E(Exception): pass\nbuiltins.AssertionError = E\ndef f(): return 2",
        "import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None\ndef f(): return 2",
        "__builtins__ = {'f': 1}\ndef f(): return 2",
        "import sys, os\nsys.excepthook = lambda *a: os._exit(0)\ndef f(): return 2",
        "import os\nfor n in range(3, 32):\n  try: os.write(n, b'+' + b'0' * 32)\n  except OSError: pass\n"
        "import builtins\nbuiltins.abs = lambda x: 1\ndef f(): return 2",
        "def f(): return 2",
        "import os\nfor n in range(3, 32):\n  try: os.close(n)\n  except OSError: pass\ndef f(): return 1",
        "import sys\ndef skip(frame, event, arg):\n  if event == 'line':\n    try: frame.f_lineno += 1\n"
        "    except ValueError: pass\n  return skip\ndef f(): return 2\nsys.settrace(skip)",
        "def f(): return 2",
        "def f(:",
    ],
)
def test_only_the_end_of_the_tests_is_success(program: str) -> None:
    assert not run_program(program, "assert abs(f()) == 1\nlast = 1").passed
    assert run_program("def f(): return 1", "assert abs(f()) == 1\nlast = 1").passed


def test_tests_cannot_be_read_before_they_run() -> None:
    """Neither they nor the token are in the process while the program's own statements run."""
    holds("""
import gc, sys
frame, texts = sys._getframe(), []
while frame:
    texts += [repr(value) for value in [*frame.f_locals.values(), frame.f_code.co_consts]]
    frame = frame.f_back
texts += [repr(each) for each in gc.get_objects() if isinstance(each, (dict, list, tuple)) and len(each) < 50]
assert not any("word of " + "the tests" in text for text in texts)
""")
    run = run_program("found = False", "word = 'word of the tests'")
    assert run.passed


def test_a_verdict_repeats() -> None:
    """The order of a set of strings is the same in every process."""
    program = "print(list({'a', 'b', 'c', 'd', 'e', 'f', 'g'}))"
    assert len({run_program(program, "").output for _ in range(4)}) == 1


def test_a_program_costs_little_more_than_a_bare_interpreter() -> None:
    """Processor time, for the clock depends on who else is at work: less than 100 ms beyond `python -I -c pass`."""

    def seconds(work: Callable[[], object], count: int = 5) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        for _ in range(count):
            work()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / count

    bare = seconds(lambda: subprocess.run([sys.executable, "-I", "-c", "pass"], check=True))
    assert seconds(lambda: run_program("def f(): return 1", "assert f() == 1")) < bare + 0.1


def test_an_ordinary_user_has_the_same_sandbox() -> None:
    setpriv = shutil.which("setpriv")
    pythons = [path for path in ("/usr/bin/python3.12", "/usr/bin/python3.11") if os.path.exists(path)]
    if os.geteuid() != 0 or setpriv is None or not pythons:
        pytest.skip("needs the root account, setpriv and a Python of the system")
    script = """
from d3llm_ray.judging.sandbox.run import run_program, sandbox_reason
print(sandbox_reason(), run_program("import os; assert os.getuid() == 65534", "assert 1").passed)
"""
    user = [setpriv, "--reuid=1234", "--regid=1234", "--clear-groups", pythons[0], "-B", "-c", script]
    done = subprocess.run(user, env={"PYTHONPATH": str(ROOT)}, cwd="/", capture_output=True, text=True, timeout=60)
    if "ModuleNotFoundError" in done.stderr or "PermissionError" in done.stderr:
        pytest.skip("another user may not read this checkout")
    assert done.stdout.strip() == "None True", done.stdout + done.stderr


def test_without_a_sandbox_nothing_runs_unless_the_user_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "sandbox_reason", lambda: "no user namespaces")
    monkeypatch.delenv(sandbox.ALLOW_UNSANDBOXED, raising=False)
    with pytest.raises(InputError, match="sandbox: .*no user namespaces; accepted: .*ALLOW_UNSANDBOXED_PROGRAMS=1"):
        run_program("", "")
    with pytest.raises(InputError, match="no user namespaces"):
        require_ready(ProgramJudge())
    require_ready(FinalAnswer())
    monkeypatch.setenv(sandbox.ALLOW_UNSANDBOXED, "1")
    run = run_program("import os\nassert not os.environ\nprint(os.getcwd())", "assert True")
    assert run.passed and not Path(run.output.decode().strip()).exists()
    assert not run_program("import sys\nsys.exit(0)", "").passed
    assert run_program("import time\ntime.sleep(20)", "", ProgramLimits(wall_s=0.5)).exit_code is None


def test_a_machine_that_cannot_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "riscv64")
    assert sandbox_reason.__wrapped__() == "no filter of system calls for riscv64"
    monkeypatch.undo()
    monkeypatch.setattr(sandbox, "SELF_TEST", "raise SystemExit('a reason of the program')")
    assert "a reason of the program" in (sandbox_reason.__wrapped__() or "")


def test_limits_are_checked() -> None:
    with pytest.raises(InputError, match="wall_s: got 0"):
        ProgramLimits(wall_s=0)


def test_the_filter_knows_both_machines() -> None:
    assert all(len(system_call_filter(machine) or b"") == 8 * (len(REFUSED) + 7) for machine in ("x86_64", "aarch64"))
    assert system_call_filter("riscv64") is None
