"""Distil with and without each part of a recipe on a Ray cluster.

    ray job submit --working-dir . -- python jobs/ablate.py --recipe llada \
        --teacher DIR --trajectories DIR --reference-trajectories DIR --device cuda --gpus-per-actor 1 --output DIR

Takes the settings of `d3llm-ray ablate`; paths must be on storage that every node sees.
"""

from __future__ import annotations

import sys

from d3llm_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["ablate", *sys.argv[1:]]))
