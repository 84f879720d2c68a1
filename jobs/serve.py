"""Serve a model for as long as a cluster job runs.

    ray job submit --working-dir . -- python jobs/serve.py --config FILE.yaml

Takes the settings of `d3llm-ray serve`. An application that should outlive the job is deployed with
`serve deploy serve_configs/FILE.yaml` instead.
"""

from __future__ import annotations

import sys

from d3llm_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
