"""Builds kt_kernel: CMake compiles one extension for every ISA, against the torch it will run with.

KT_TORCH_VERSION (default below) names that torch for the build and for the run-time requirement alike.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "kt_kernel/__init__.py").read_text())[1]
# What SGLang 0.5.18 pins. The extension links against this ABI, so the requirement is exact.
TORCH_VERSION = os.environ.get("KT_TORCH_VERSION", "2.13.0")

# From PyPI only where the system has none.
BUILD_TOOLS = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]


class CMakeBuild(build_ext):
    """Runs CMake for `kt_kernel._ext` and leaves the module where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11
            import torch
        except ImportError as error:
            raise SystemExit(
                f"kt_kernel: {error}; with --no-build-isolation first run: pip install torch=={TORCH_VERSION} pybind11"
            ) from None
        built_version = torch.__version__
        if built_version.split("+")[0] != TORCH_VERSION:
            raise SystemExit(
                f"kt_kernel: torch {built_version} is installed but {TORCH_VERSION} is asked for; "
                f"install that one, or set KT_TORCH_VERSION={built_version.split('+')[0]}."
            )
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(os.environ.get("KT_BUILD_DIR", Path(self.build_temp).resolve() / "cmake"))
        build.mkdir(parents=True, exist_ok=True)
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        configure = [
            "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build),
            "-DCMAKE_BUILD_TYPE=Release", "-DKT_BUILD_EXTENSION=ON",
            f"-DKT_TORCH_ROOT={Path(torch.__file__).parent}", f"-DKT_TORCH_VERSION={built_version}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "_ext", "-j", jobs], check=True)
        self.write_build_info(module.parent, built_version)

    def copy_extensions_to_source(self) -> None:  # pip install -e
        import torch

        super().copy_extensions_to_source()
        self.write_build_info(ROOT / "kt_kernel", torch.__version__)

    @staticmethod
    def write_build_info(package: Path, torch_version: str) -> None:
        # Read by kt_kernel/__init__.py before the extension is loaded: a wrong torch must give a sentence, not a
        # missing symbol.
        (package / "_build_info.py").write_text(f'TORCH_VERSION = "{torch_version}"\n')


setup(
    name="kt-moe-experts",
    version=VERSION,
    description="CPU experts for Mixture-of-Experts models inside stock SGLang",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        "kt_kernel",
        "kt_kernel.bench",
        "kt_kernel.bench.peers",
        "kt_kernel.checkpoint",
        "kt_kernel.device_stream",
        "kt_kernel.integrations",
        "kt_kernel.integrations.sglang",
        "kt_kernel.placement",
    ],
    ext_modules=[Extension("kt_kernel._ext", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    # Asked for by pip's isolated build; here rather than in pyproject.toml because the version is a variable.
    setup_requires=[f"torch=={TORCH_VERSION}", "pybind11>=2.12", *BUILD_TOOLS],
    install_requires=[f"torch=={TORCH_VERSION}", "numpy", "gguf>=0.18", "safetensors>=0.8", "tqdm>=4.60"],
    extras_require={"bench": ["matplotlib>=3.8"]},  # --plot of python -m kt_kernel.bench
    entry_points={
        "sglang.srt.plugins": ["kt_kernel = kt_kernel.integrations.sglang:register"],
        "sglang.srt.platforms": ["kt_cpu = kt_kernel.integrations.sglang:activate"],
    },
    zip_safe=False,
)
