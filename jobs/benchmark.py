"""Measure decoding speed in a cluster job.

    ray job submit --working-dir . -- python jobs/benchmark.py --model DIR --task arith --device cuda --dtype bfloat16

Takes the settings of `d3llm-ray benchmark`; the last line it prints is the report as JSON.
"""

from __future__ import annotations

import sys

from d3llm_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
