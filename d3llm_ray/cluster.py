"""Joining a Ray cluster, or starting an embedded one, with the settings that spare users the known traps."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from d3llm_ray.errors import InputError, one_line

# Set before Ray starts; a user's own value wins.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # Train's report() waits a poll of the controller: 2 s by default
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # the dashboard's Train tab
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "600",  # a lost worker must end in an error, not in a hang
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "5",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
    # glibc otherwise gives every large tensor back to the system and faults its pages in anew: a forward of 32 rows on
    # the CPU takes 1.3 times as long.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}
EMBEDDED_CPUS = 5
EMBEDDED_OBJECT_STORE_BYTES = 300_000_000


@contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Give SIGTERM back to whoever handled it: Ray's own handlers abort the process with a stack trace."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)


@_keeping_sigterm()
def connect(*, quiet: bool = True, dashboard: bool = False, min_cpus: int = EMBEDDED_CPUS) -> None:
    """Use the Ray that is already there, join the cluster of `RAY_ADDRESS`, or start an embedded one.

    An embedded cluster counts at least 5 logical CPUs, and `min_cpus`: on a laptop its actors mostly wait for each
    other, and Ray Data and Train reserve a CPU for every helper (a pipeline on two would wait for ever).
    `InputError` for a `RAY_ADDRESS` where no cluster is.
    """
    if ray.is_initialized():
        return
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    level = logging.ERROR if quiet else logging.INFO
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(log_to_driver=not quiet, logging_level=level)
        except (ConnectionError, ValueError) as error:
            reason = one_line(error)
            accepted = "the address of a cluster that runs; without it an embedded one is started"
            raise InputError(f"RAY_ADDRESS: got {address!r}: {reason}; accepted: {accepted}") from error
        return
    # An embedded cluster listens on this host only; without this a token would be written to the home folder and
    # change what the user's next `ray start` does.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(
        num_cpus=max(EMBEDDED_CPUS, min_cpus, os.cpu_count() or 1),
        object_store_memory=EMBEDDED_OBJECT_STORE_BYTES,
        include_dashboard=dashboard,
        log_to_driver=not quiet,
        logging_level=level,
    )


def quieten(library: str) -> None:
    """Let a library of Ray's (`ray.data`, say) print errors only; its log files keep everything."""
    for handler in logging.getLogger(library).handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.ERROR)


def wait_for_resources(bundles: list[dict[str, float]], timeout_s: float, field: str) -> None:
    """Return when the cluster can hold all `bundles` (resources each) at once; an autoscaler is asked to help.

    Ray itself would wait for ever, without a word. Raises `InputError` naming `field`, what was demanded and what is
    there, after `timeout_s`.
    """
    group = placement_group(bundles, strategy="PACK")
    try:
        if group.wait(timeout_s):
            return
        demand: Counter[str] = Counter()
        for bundle in bundles:
            demand.update(bundle)
        free, total = ray.available_resources(), ray.cluster_resources()  # type: ignore[no-untyped-call]
        wanted = []
        for name, amount in demand.items():
            there = (_amount(name, resources.get(name, 0.0)) for resources in (free, total))
            wanted.append("{} ({} free of {})".format(_amount(name, amount), *there))
        raise InputError(
            f"{field}: the cluster did not give within {timeout_s:g} s: {', '.join(wanted)}; accepted: what fits in it"
        )
    finally:
        remove_placement_group(group)


def _amount(name: str, amount: float) -> str:
    return f"{amount / 2**30:.1f} GiB {name}" if name == "memory" else f"{amount:g} {name}"
