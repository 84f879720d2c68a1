"""Prove on a GPU what no GPU has run yet, and measure it; needs torch, triton and transformers alone.

    PYTHONPATH=. python jobs/gpu_check.py            # the same again until it says that nothing is left

Exit codes: 0 all is done and well, 1 a check has failed, 2 bad input (no GPU, say), 3 parts are left.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
from pathlib import Path

GRACE_S = 60.0  # behind the limit a part that hangs is ended, and the call with it

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="GPU check; a call continues what an earlier one has left.")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N; cpu with --quick")
    parser.add_argument("--quick", action="store_true", help="toy sizes: check the check itself")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/gpu-check"), help="folder of the parts and the report"
    )
    parser.add_argument("--limit-s", type=float, default=480.0, help="seconds of a call")
    parser.add_argument("--again", action="store_true", help="run again what has failed")
    given = parser.parse_args()
    if given.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
    from d3llm_ray.benchmark.gpu_check import check
    from d3llm_ray.errors import InputError

    faulthandler.dump_traceback_later(given.limit_s + GRACE_S, exit=True)
    try:
        code = check(given.device, quick=given.quick, output=given.output, limit_s=given.limit_s, again=given.again)
    except InputError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)
