"""Ask one of the paper's claims again in a cluster job.

    ray job submit --working-dir . -- python jobs/check.py refresh --actors 4 --model /models/student --device cuda \\
        --task long-gsm8k --output /data/check

Takes the settings of `d3llm-ray check`, or with `transfer` first those of `d3llm-ray check transfer`; the last
line it prints is the report as JSON.
"""

from __future__ import annotations

import sys

from d3llm_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["check", *sys.argv[1:]]))
