"""What the package consists of, as installed: in the source tree or from a wheel."""

import os
from pathlib import Path

import foreseer

PACKAGE = Path(foreseer.__file__).parent


def package_files() -> list[str]:
    """Every file of the package, relative to it, following the directory links."""
    found = []
    for folder, names, files in os.walk(PACKAGE, followlinks=True):
        names[:] = [name for name in names if name != "__pycache__"]
        found += [(Path(folder) / name).relative_to(PACKAGE).as_posix() for name in files]
    return sorted(found)


def source_files() -> list[str]:
    """Every Python file of the package, relative to it."""
    return [name for name in package_files() if name.endswith(".py")]


def module_name(path: str) -> str:
    """`foreseer.training.l2p` for `training/l2p.py`."""
    parts = ["foreseer", *Path(path).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
