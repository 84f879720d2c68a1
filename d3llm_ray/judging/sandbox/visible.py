"""What of the machine a program sees: the interpreter, its standard library, the shared libraries they need."""

from __future__ import annotations

import os
import sys

SYSTEM = ("/lib", "/lib64", "/lib32", "/usr/lib", "/usr/lib64", "/usr/lib32", "/etc/ld.so.cache")
PACKAGES = ("site-packages", "dist-packages")


def interpreter() -> str:
    """The interpreter itself, not that of a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def visible_paths() -> list[str]:
    """Absolute paths, each a folder, a file or a link; none of them below another."""
    base = os.path.realpath(sys.base_prefix)
    paths = [path for path in (*SYSTEM, f"{base}/lib", f"{base}/lib64", interpreter()) if os.path.lexists(path)]
    folders = [path for path in paths if os.path.isdir(path) and not os.path.islink(path)]
    unique = dict.fromkeys(paths)
    return [path for path in unique if not any(path.startswith(f"{folder}/") for folder in folders)]


def hidden_paths() -> list[str]:
    """Folders of installed packages below what is visible: they may hold the user's own code."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    base = os.path.realpath(sys.base_prefix)
    homes = [f"{base}/{lib}/{python}" for lib in ("lib", "lib64") for python in (version, "python3")]
    return [f"{home}/{packages}" for home in [*homes, "/usr/lib/python3"] for packages in PACKAGES]
