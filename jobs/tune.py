"""Search decoding settings on a Ray cluster.

    ray job submit --working-dir . -- python jobs/tune.py --model DIR --space tune_spaces/llada-8b.yaml --actors 8

Takes the settings of `d3llm-ray tune`; paths must be on storage that every node sees.
"""

from __future__ import annotations

import sys

from d3llm_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
