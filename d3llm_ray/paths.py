"""Paths as users write them: `~` and environment variables mean the same in every setting, file and call."""

from __future__ import annotations

import os
import re

from d3llm_ray.errors import InputError

VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
# Where Ray unpacks what a job was submitted with (its `working_dir`), which is the job's working directory then.
PACKAGE = re.compile(r"/runtime_resources/working_dir_files/[^/]+(?=/|$)")


def expanded(path: str | os.PathLike[str], field: str = "path") -> str:
    """`path` with `~`, `$NAME` and `${NAME}` replaced, a URL as it is. `InputError` for a variable that is not set."""
    text = os.fspath(path)
    if "://" in text:
        return text
    for match in VARIABLE.finditer(text):
        name = match[1] or match[2]
        if name not in os.environ:
            raise InputError(f"{field}: got {text!r}: the environment variable {name} is not set")
    return os.path.expanduser(os.path.expandvars(text))


def in_job_package(path: str | os.PathLike[str]) -> bool:
    """Whether a local path lies in the package of a Ray job, as its relative paths do: Ray deletes it when it likes."""
    return PACKAGE.search(os.path.realpath(path)) is not None


def not_uploaded(path: str | os.PathLike[str]) -> str:
    """Why something is not there, to end an error with; empty outside of the package of a Ray job."""
    if "://" in os.fspath(path) or os.path.isfile(path) or not in_job_package(path):
        return ""
    return (
        " (looked for in the package of this Ray job: files that git ignores are not uploaded; give an absolute path "
        "on storage that all nodes see)"
    )
