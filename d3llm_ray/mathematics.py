"""Whether two answers of mathematics are the same, by the package math-verify in a process of its own.

Computer algebra may take forever, in C code that no signal interrupts (`9^{9^{9^9}}`), and math-verify's own timeouts
work in a main thread only. So a process with bounded CPU time and memory compares: no answer can hang a worker, any
thread may ask, and the verdict does not depend on how busy the machine is.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache, lru_cache
from importlib.util import find_spec
from threading import Lock

from d3llm_ray.errors import InputError

MOST_CHARACTERS = 500  # a longer answer is not looked into; the longest reference of MATH-500 has 157
CPU_SECONDS = 2  # of one comparison; usual ones take 0.02
MEMORY_BYTES = 2 << 30
_lock = Lock()

_PROGRAM = f"""
import json, logging, resource, sys, time
from math_verify import parse, verify

def limit(kind, most):
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))

logging.disable(logging.CRITICAL)
out, sys.stdout = sys.stdout, sys.stderr
limit(resource.RLIMIT_CORE, 0)
limit(resource.RLIMIT_AS, {MEMORY_BYTES})
print("ready", file=out, flush=True)
for line in sys.stdin:
    limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + {CPU_SECONDS})
    try:
        reference, answer = (parse(text, parsing_timeout=None) for text in json.loads(line))
        verdict = bool(verify(reference, answer, timeout_seconds=None))
    except Exception:
        verdict = False
    print(json.dumps(verdict), file=out, flush=True)
"""


@lru_cache(maxsize=4096)
def same_mathematics(reference: str, answer: str) -> bool:
    """Whether two expressions in LaTeX, or texts that hold one, are the same number, formula, interval, set, ...

    False where that cannot be found out within the bounds.

    Raises:
        InputError: math-verify is not installed.
        RuntimeError: its process does not start.
    """
    pair = [_readable(text) for text in (reference, answer)]
    if max(map(len, pair)) > MOST_CHARACTERS:
        return False
    with _lock:
        if _judge().poll() is not None:  # killed from outside meanwhile
            _judge.cache_clear()
        judge = _judge()
        assert judge.stdin is not None and judge.stdout is not None
        judge.stdin.write(json.dumps(pair) + "\n")
        judge.stdin.flush()
        verdict = judge.stdout.readline()
        if not verdict:
            _judge.cache_clear()
            if judge.wait() > 0:  # not a signal, with which every bound ends it
                raise RuntimeError(f"math-verify failed on {reference!r} and {answer!r}, see above")
            return False
        return json.loads(verdict) is True


def is_sentence(text: str) -> bool:
    """Whether words follow each other, but for those in LaTeX's `\\text{}`."""
    return re.search(r"[A-Za-z]{2,}\s+[A-Za-z]{2,}", re.sub(r"\\[a-z]+\{[^{}]*\}", "", text)) is not None


def _readable(text: str) -> str:
    """What math-verify reads rightly: a text's end as it is, an expression in a box."""
    text = re.sub(r"(?<![\d.])\.(?=\d)", "0.", text)  # it takes .5 for 5
    text = re.sub(r"(\d+)_\{?(\d+)\}?", r"(\1,\2)", text)  # and drops the base of a number
    inner = text.strip("$ .")
    return text[-MOST_CHARACTERS:] if "$" in inner or is_sentence(inner) else rf"\boxed{{{inner}}}"


@cache
def _judge() -> subprocess.Popen[str]:
    if find_spec("math_verify") is None:
        raise InputError(
            "reference: answers of mathematics are compared by math-verify; accepted: pip install math-verify"
        )
    judge = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,  # an interrupt from the keyboard is not meant for it
    )
    assert judge.stdout is not None
    if judge.stdout.readline() != "ready\n":
        raise RuntimeError(f"math-verify does not start (exit code {judge.wait()}), see above")
    return judge
