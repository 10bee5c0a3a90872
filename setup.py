"""The distribution `steadfast-sft`. Ranges are what the code runs on; the exact, tested set is in requirements*.txt."""

from setuptools import find_packages, setup

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
    "psutil>=7.0",
    "xxhash>=3.5",
]

EXTRAS = {
    "synth": ["vllm>=0.32,<0.33", "openai>=3.50", "datasketch>=2.0", "py3langid>=0.4", "scikit-learn>=1.8"],
    "remote": ["s3fs>=2025.3", "gcsfs>=2025.3", "aiohttp>=3.12", "requests>=2.32"],
    "quant": ["bitsandbytes>=0.50"],
    "gguf": ["gguf>=0.19"],
    "flash": ["flash-attn>=2.8"],
    "eval": ["lm-eval>=0.4.9", "py3langid>=0.4"],
    "logging": ["wandb>=0.22"],
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
