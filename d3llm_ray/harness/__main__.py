"""The command line of lm-eval, with the model `d3llm` beside its own: `python -m d3llm_ray.harness ...`."""

from __future__ import annotations

import sys

from d3llm_ray.errors import InputError, WorkError


def main() -> int:
    """Hand the command line on; what goes wrong here is one line on stderr, with the exit codes of `d3llm-ray`."""
    try:
        from lm_eval.__main__ import cli_evaluate

        from d3llm_ray.harness.model import register

        register()
        cli_evaluate()
        return 0
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        code, line = 2, f'{error}: pip install "d3llm-ray[eval]"'
    except InputError as error:
        code, line = 2, str(error)
    except WorkError as error:
        code, line = 1, str(error)
    print(f"d3llm_ray.harness: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
