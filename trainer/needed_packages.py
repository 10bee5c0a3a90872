"""Tell in one line which packages this Python lacks, before an import of one fails."""

from __future__ import annotations

import importlib.util
import shlex
import sys

# Ranges are what the code runs on; the exact, tested set is in requirements*.txt.
REQUIRES = [
    "torch>=2.11,<2.15",
    "triton>=3.6,<3.10; platform_system == 'Linux'",
    "transformers>=5.16,<5.24",
    "accelerate>=1.10",
    "peft>=0.21,<0.22",
    "datasets>=5.0,<6",
    "pyarrow>=21.0",
    "fsspec>=2025.3",
    "safetensors>=0.6",
    "tokenizers>=0.22",
    "jsonargparse>=4.40",
    "Jinja2>=3.1",
    "PyYAML>=6.0",
    "numpy>=2.0",
    "matplotlib>=3.10",
    "tensorboard>=2.20",
    "tqdm>=4.67",
    "rich>=14.0",
    "regex>=2025.7",
    "psutil>=7.0",
    "xxhash>=3.5",
]


def lacking() -> dict[str, str]:
    """Return {name: requirement} of the packages that are not installed.

    Triton is not among them: without it the references serve.
    """
    names = {requirement.partition(">=")[0]: requirement for requirement in REQUIRES if ";" not in requirement}
    return {name: requirement for name, requirement in names.items()
            if importlib.util.find_spec({"PyYAML": "yaml"}.get(name, name.lower())) is None}


def refuse_to_start_without_them() -> None:
    """End the process with one line where packages are not installed.

    It names them, and the command that brings them.
    """
    if absent := lacking():
        command = shlex.join([sys.executable, "-m", "pip", "install", *absent.values()])
        sys.exit(f"steadfast: error: expected the packages {', '.join(absent)}, found none of them in this Python; "
                 f"get them with: {command}")
