"""Finds nvcc for setup.py and the compile gate; ``python cmake/nvcc.py`` prints it, or why there is none."""

from __future__ import annotations

import os
import shutil
import site
import sys
import sysconfig
from pathlib import Path

TOOLKIT = "/usr/local/cuda"
PLACES = "CUDACXX, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda, or the wheels nvidia-cuda-nvcc beside this Python"


def find_nvcc() -> tuple[str, str]:
    """The compiler and "", or "" and why there is none. CUDACXX alone counts where it is set."""
    if named := os.environ.get("CUDACXX", ""):
        found = shutil.which(named)
        return (found, "") if found else ("", f"CUDACXX={named} is no program")
    roots = [root for name in ("CUDA_HOME", "CUDA_PATH") if (root := os.environ.get(name, ""))]
    candidates = [*(f"{root}/bin/nvcc" for root in roots), "nvcc", f"{TOOLKIT}/bin/nvcc", *wheels()]
    found = next(filter(None, map(shutil.which, candidates)), None)
    return (found, "") if found else ("", f"nvcc was not found in {PLACES}")


def wheels() -> list[str]:
    """nvcc of pip packages, newest first. The folders are asked for by name: pip hides them from an isolated build."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    found = [sorted(Path(folder).glob("nvidia/cu*/bin/nvcc"), reverse=True) for folder in dict.fromkeys(folders)]
    return [str(path) for paths in found for path in paths]


if __name__ == "__main__":
    nvcc, missing = find_nvcc()
    sys.exit(print(nvcc) if nvcc else missing)
