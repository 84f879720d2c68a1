"""Cluster job: `ray job submit -- python jobs/tune.py --config FILE.yaml`. Ends with the settings' path."""

from __future__ import annotations

import sys

from d3llm_ray.config import parse, to_yaml
from d3llm_ray.errors import InputError
from d3llm_ray.tuning.run import run
from d3llm_ray.tuning.settings import TuneSettings


def main() -> int:
    try:
        settings, print_config = parse(TuneSettings, sys.argv[1:], prog="jobs/tune.py")
        print(to_yaml(settings) if print_config else run(settings))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
