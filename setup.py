"""The distribution `steadfast-sft`. Ranges are what the code runs on; the exact, tested set is in requirements*.txt."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

REQUIRES = runpy.run_path(str(Path(__file__).with_name("trainer") / "needed_packages.py"))["REQUIRES"]

EXTRAS = {
    "synth": ["vllm>=0.32,<0.33", "openai>=3.50", "datasketch>=2.0", "py3langid>=0.4", "scikit-learn>=1.8"],
    "remote": ["s3fs>=2025.3", "gcsfs>=2025.3", "aiohttp>=3.12", "requests>=2.32"],
    "quant": ["bitsandbytes>=0.50"],
    "gguf": ["gguf>=0.19"],
    "flash": ["flash-attn>=2.8"],
    "eval": ["lm-eval>=0.4.9", "py3langid>=0.4"],
    "logging": ["wandb>=0.22", "trackio>=0.26", "mlflow>=3.0"],
    "dev": ["trl>=1.16,<1.17", "pytest>=9.0", "pytest-xdist>=3.8", "hypothesis>=6.140", "ruff>=0.14"],
}

setup(
    name="steadfast-sft",
    # Stays 0.1.x: transformers takes the distribution that owns the import name `kernels` for Hugging Face's hub
    # client, and a version below 0.17 tells it that the client is not here.
    version="0.1.0",
    description="Fine-tune a language model on your domain, fast, without losing what it could already do",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=[f"{top}{rest}" for top in ("kernels", "trainer", "synth", "benchmarks") for rest in ("", ".*")]),
    package_data={
        "trainer": ["**/*.jinja", "recipes/*", "evaluation/suites/mini/*.jsonl"],
        "synth": ["**/*.jinja", "**/*.txt", "recipes/*.yaml"],
        "benchmarks": ["results/*.json", "**/*.jinja"],
        "benchmarks.forgetting.miniature": ["*.txt", "**/*.json", "**/*.jinja", "**/*.safetensors"],
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
