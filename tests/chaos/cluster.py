"""A Ray cluster of several nodes on one host. Each node is a process tree of its own, and dies as one."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

CPUS_PER_NODE = 2  # logical: the job's actors mostly sleep
STARTUP_S = 300.0  # of all nodes, on a busy machine
SYSTEM = {
    # A node that is gone (connection refused) is noticed within 2 s, not 30; one that is merely slow is left alone.
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 10_000,
    "health_check_failure_threshold": 4,
    "worker_register_timeout_seconds": 300,
    # Spare the host's few cores: no idle workers, and none that yields to whatever else runs.
    "prestart_worker_first_driver": False,
    "worker_niceness": 0,
}


class Node:
    """`ray start --block` with its raylet and workers. `folder`: its own for Ray's files, by which drivers find it."""

    def __init__(self, folder: Path, *options: str) -> None:
        # `ray stop` and Ray's own killers act on every Ray process of the host; what is started here is known by pid.
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats", *options]
        command += [f"--num-cpus={CPUS_PER_NODE}", "--object-store-memory=100000000", "--include-log-monitor=false"]
        command += ["--dashboard-agent-listen-port=0", f"--temp-dir={folder}"]
        folder.mkdir()
        log = folder / "node.log"
        with log.open("w") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        self.folder, self._log = folder, log

    def comes_up(self) -> bool:
        """Wait until it has joined; False when it gave up, as Ray does after 30 s of a busy machine."""
        while "Ray runtime started" not in self.printed:
            if not self.alive:
                return False
            time.sleep(0.1)
        return True

    @property
    def printed(self) -> str:
        return self._log.read_text()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def pids(self) -> set[int]:
        """Every process of this node."""
        return {process.pid for process in self._tree()}

    def kill(self) -> None:
        """SIGKILL to all its processes at once, as when a machine loses power."""
        tree = self._tree()
        for process in tree:
            process.kill()
        self._process.wait()
        psutil.wait_procs(tree, timeout=10)

    def _tree(self) -> list[psutil.Process]:
        if not self.alive:
            return []
        root = psutil.Process(self._process.pid)
        return [root, *root.children(recursive=True)]


class Cluster:
    """A head and `workers` more nodes. Drivers join the head (Ray prefers it), so workers can be killed under them."""

    def __init__(self, folder: Path, workers: int) -> None:
        self._folder, self._size, self._started = folder, workers, 0
        self._head = self._start_head()
        self.workers: list[Node] = []

    @property
    def address(self) -> str:
        file = self._head.folder / "ray_current_cluster"  # written just after the head says that it has started
        while not file.exists():
            assert self._head.alive, self._head.printed
            time.sleep(0.1)
        return file.read_text().strip()

    def restore(self) -> None:
        """Start the nodes that are missing, and return when all are up."""
        deadline = time.monotonic() + STARTUP_S
        while not self._head.comes_up():
            assert time.monotonic() < deadline, self._head.printed
            self._head = self._start_head()
        self.workers = [node for node in self.workers if node.alive]
        while len(self.workers) < self._size:
            node = self._start(f"--address={self.address}")
            if node.comes_up():
                self.workers.append(node)
            assert time.monotonic() < deadline, node.printed

    def _start_head(self) -> Node:
        ports = {"--port": 0, "--ray-client-server-port": free_port()}
        options = [f"{name}={port}" for name, port in ports.items()]
        return self._start("--head", "--include-dashboard=false", f"--system-config={json.dumps(SYSTEM)}", *options)

    def _start(self, *options: str) -> Node:
        self._started += 1
        return Node(self._folder / f"node{self._started}", *options)

    def close(self) -> None:
        for node in [*self.workers, self._head]:
            node.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
