"""Packaging: the import packages `tinynn` (the engine) and `kernels` (arrays only)."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="tinynn",
    version="0.1.0",
    description="A neural-network engine in NumPy and Numba, readable and fast in every step",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["tinynn", "tinynn.*", "kernels", "kernels.*"]),
    python_requires=">=3.10",
    install_requires=[
        "numpy>=2.0",
        "numba>=0.63",
        "scipy>=1.11",
        "matplotlib>=3.8",
        "pillow>=10",
        "tqdm>=4.66",
        "safetensors>=0.4.3",
        "threadpoolctl>=3.2",
    ],
    extras_require={
        "test": ["pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100", "ruff>=0.6", "mypy>=1.11"],
        "peers": ["torch==2.13.0", "onnxruntime>=1.20", "onnx>=1.17", "openvino>=2025.0"],
        "onnx": ["onnx>=1.17"],
        "cluster": ["dask[distributed]>=2024.8"],
    },
    classifiers=[
        "License :: OSI Approved :: MIT License",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
