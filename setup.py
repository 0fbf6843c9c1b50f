"""Packaging metadata: the only place for name, version, dependencies and extras.

`pyproject.toml` deliberately has no `[project]` table; two metadata sources break editable
installs.
"""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "longctx_jax/__init__.py").read_text()).group(
    1
)

TEST = [
    "beartype",
    "hypothesis",
    "jupyter-client",
    "ipykernel",
    "nbclient",
    "nbformat",
    "pyright",
    "pytest",
    "pytest-xdist",
    "ruff",
    "safetensors",
    "sentencepiece",
    "submitit",
    "tokenizers",
]

setup(
    name="longctx_jax",
    version=VERSION,
    description="Long-context language models in JAX: five published schemes, one contract.",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["longctx_jax", "longctx_jax.*"]),
    install_requires=[
        "absl-py",
        "flax>=0.12",
        "grain>=0.2.18",
        # tensorflow-datasets imports importlib_resources without declaring it.
        "importlib_resources",
        "jax>=0.10.2,<0.13",
        "jaxtyping",
        "matplotlib",
        "ml-collections",
        "numpy",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "tensorboardX",
        "tensorflow-datasets>=4.9.10",
    ],
    extras_require={
        "cuda13": ["jax[cuda13]>=0.10.2,<0.13"],
        "tpu": ["jax[tpu]>=0.10.2,<0.13"],
        "text": ["sentencepiece"],
        "wandb": ["wandb"],
        "slurm": ["submitit"],
        "hf": ["safetensors", "tokenizers"],
        "notebooks": ["jupyterlab"],
        "test": TEST,
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
