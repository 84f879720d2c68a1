"""Let a teacher decode prompts on a Ray cluster and write its trajectories.

    ray job submit --working-dir . -- python jobs/generate_trajectories.py --teacher DIR --prompts FILE --output DIR

Takes the settings of `d3llm-ray trajectories`; paths must be on storage that every node sees.
"""

from __future__ import annotations

import sys

from d3llm_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["trajectories", *sys.argv[1:]]))
