r"""Distil a student on a Ray cluster.

    ray job submit --working-dir . -- python jobs/distill.py --config llada \
        --teacher DIR --trajectories DIR --output DIR

Takes the settings of `d3llm-ray distill`; paths must be on storage that every node sees.
"""

from __future__ import annotations

import sys

from d3llm_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["distill", *sys.argv[1:]]))
