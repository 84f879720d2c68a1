"""System calls that no judged program needs, refused by a filter of the kernel (seccomp).

They reach what namespaces and limits do not hold: memory outside the address space (memfd, System V shared memory),
sockets of families without a namespace (vsock, to the host of a virtual machine), kernel keys, other processes.
"""

from __future__ import annotations

import platform
import struct

# Name: number on x86_64, on aarch64 (asm/unistd.h of Linux 6.1).
REFUSED = {
    "socket": (41, 198),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "mount_setattr": (442, 442),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
}
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*
_X32 = 0x40000000  # x86_64's second table of the same calls
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_KILL, _REFUSE, _ALLOW = 0x80000000, 0x00050001, 0x7FFF0000  # refused: errno EPERM


def system_call_filter(machine: str = platform.machine()) -> bytes | None:
    """The filter as an array of `struct sock_filter` (BPF); None for a machine whose call numbers are not known."""
    if machine not in MACHINES:
        return None
    column = list(MACHINES).index(machine)
    calls = [numbers[column] for numbers in REFUSED.values()]
    rows = [
        (_LOAD, 0, 0, 4),  # seccomp_data.arch
        (_EQUAL, 1, 0, MACHINES[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # seccomp_data.nr
        (_AT_LEAST, len(calls) + 1, 0, _X32),
    ]
    rows += [(_EQUAL, len(calls) - place, 0, number) for place, number in enumerate(calls)]
    rows += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)]
    return b"".join(struct.pack("=HBBI", *row) for row in rows)
