"""Measure systems beside each other in a cluster job.

    ray job submit --working-dir . -- python jobs/leaderboard.py --actors 4 --output /data/leaderboard

Takes the settings of `d3llm-ray leaderboard`; the last line it prints is the board as JSON.
"""

from __future__ import annotations

import sys

from d3llm_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["leaderboard", *sys.argv[1:]]))
