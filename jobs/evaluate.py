"""Cluster job: `ray job submit -- python jobs/evaluate.py --config FILE.yaml`. Ends stdout with one line of JSON."""

from __future__ import annotations

import sys

from d3llm_ray.config import parse, to_yaml
from d3llm_ray.errors import InputError
from d3llm_ray.evaluation.run import run
from d3llm_ray.evaluation.settings import EvaluateSettings


def main() -> int:
    try:
        settings, print_config = parse(EvaluateSettings, sys.argv[1:], prog="jobs/evaluate.py")
        print(to_yaml(settings) if print_config else run(settings))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
