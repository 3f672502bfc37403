"""What a bug report must say: versions, machine, commit, read without importing any of them.

No path, user or machine name is part of it.
"""

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from foreseer import __version__

NAME = re.compile(r"[A-Za-z0-9._-]+")
EXTRA = re.compile(r"""extra\s*==\s*['"]([^'"]+)['"]""")
THREADS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS")
WIDTH = 12  # of the first column


def version_report() -> str:
    """`foreseer X.Y.Z` on the first line, then a fact per line."""
    facts = {
        "commit": commit(),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": f"{processor()}, {usable_cores()} of {os.cpu_count()} cores",
        "gpu": gpus(),
        "threads": ", ".join(f"{name}={os.environ.get(name, 'not set')}" for name in THREADS),
        **packages(),
    }
    lines = [f"{name:<{WIDTH}}{fact}" for name, fact in facts.items()]
    return "\n".join([f"foreseer {__version__}", "", *lines])


def packages() -> dict[str, str]:
    """Installed versions: of what foreseer always needs, then of each of its extras."""
    groups: dict[str, list[str]] = {}
    try:
        needed = requires("foreseer") or []
    except PackageNotFoundError:
        return {"packages": "not known: foreseer was not installed by pip"}
    for line in needed:
        extra, name = EXTRA.search(line), NAME.match(line)
        assert name is not None  # a requirement starts with a name
        group = "packages" if extra is None else f"[{extra[1]}]"
        groups.setdefault(group, []).append(f"{name[0]} {installed(name[0])}")
    return {group: ", ".join(names) for group, names in groups.items()}


def installed(name: str) -> str:
    """The installed version of a package, or `missing`."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def gpus() -> str:
    """Name, memory and driver of every NVIDIA GPU; whether torch can use them is in its version."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except FileNotFoundError:
        return "no nvidia-smi"
    except (OSError, subprocess.SubprocessError):
        return "nvidia-smi failed"
    return "; ".join(done.stdout.strip().splitlines()) or "none"


def processor() -> str:
    """The processor's model as the system names it, else its architecture."""
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        for line in facts.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def usable_cores() -> int | None:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def commit() -> str:
    """The commit of the source tree, marked when files differ from it; else the release.

    An environment that lies inside somebody else's repository is no source tree: this very file
    must be one of the repository's.
    """
    folder = Path(__file__).resolve().parent
    try:
        _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
        found = _git(folder, "rev-parse", "HEAD")
        changed = bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return f"release {__version__}"
    return found + (" with local changes" if changed else "")


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()
