"""Measure models and decoders in a cluster job.

    ray job submit --working-dir . -- python jobs/evaluate.py --models DIR --decoders vanilla,d3llm --device cuda

Takes the settings of `d3llm-ray evaluate`; the last line it prints is the report as JSON.
"""

from __future__ import annotations

import sys

from d3llm_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
