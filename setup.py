"""Builds the native module with CMake; everything else is in pyproject.toml.

Environment variables:
  CFPO_KERNELS_NATIVE       ON (default) or OFF: a wheel in pure Python, for any system; plain torch
                            and the Triton kernels
  CFPO_KERNELS_CUDA         ON, OFF or AUTO (default): build the CUDA part
  CFPO_KERNELS_CUDA_ARCHS   e.g. "90a-real;80-virtual" (separated by ; , or spaces)
  CFPO_KERNELS_BUILD_TYPE   Release (default), RelWithDebInfo or Debug
  CFPO_KERNELS_CMAKE_ARGS   more arguments for CMake
  MAX_JOBS                  parallel compilations (default: the CPUs this process may use)
"""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:
    # Without build isolation nobody checks [build-system], and an older one fails obscurely.
    raise SystemExit(f"setuptools 77 or newer is needed, this is {setuptools.__version__}")

ROOT = Path(__file__).resolve().parent
ARCH = re.compile(r"(\d+[af]?(-real|-virtual)?|native|all|all-major)")
# What CMake reads from the environment once and then keeps in its cache.
COMPILER_VARIABLES = ("CXX", "CXXFLAGS", "LDFLAGS")
CUDA_VARIABLES = ("CUDACXX", "CUDAFLAGS", "CUDAHOSTCXX", "CUDA_HOME", "CUDA_PATH")


def one_of(name, default, choices):
    value = os.environ.get(name) or default
    by_lower = {choice.lower(): choice for choice in choices}
    if value.lower() not in by_lower:
        raise SystemExit(f"{name} must be one of {', '.join(choices)}, not {value!r}")
    return by_lower[value.lower()]


def cuda_archs():
    archs = re.split(r"[;,\s]+", os.environ.get("CFPO_KERNELS_CUDA_ARCHS", "").strip("; ,"))
    for arch in filter(None, archs):
        if not ARCH.fullmatch(arch):
            raise SystemExit(
                "CFPO_KERNELS_CUDA_ARCHS must list architectures such as 90a-real or 80-virtual, "
                f"not {arch!r}"
            )
    return ";".join(filter(None, archs))


def max_jobs():
    value = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    if not value.isdigit() or int(value) < 1:
        raise SystemExit(f"MAX_JOBS must be a positive whole number, not {value!r}")
    return value


def tool(name, folder_attribute):
    """The program of the Python package `name` if installed, else the one on PATH.

    In this order because the package is what [build-system] asked for, and the scripts folder of
    an environment that is not activated is not on PATH.
    """
    try:
        folder = getattr(importlib.import_module(name), folder_attribute)
    except (ImportError, AttributeError):
        folder = None
    path = (folder and shutil.which(name, path=folder)) or shutil.which(name)
    if not path:
        raise SystemExit(f"{name} was not found: pip install {name}")
    return path


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        import pybind11

        # Not self.build_temp: for editable installs that is a temporary folder, and each build
        # would start from nothing.
        folder = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        arguments = [
            f"-DCMAKE_BUILD_TYPE={self.build_type()}",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja', 'BIN_DIR')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCFPO_KERNELS_CUDA={one_of('CFPO_KERNELS_CUDA', 'AUTO', ('ON', 'OFF', 'AUTO'))}",
        ]
        if archs := cuda_archs():
            arguments.append(f"-DCFPO_KERNELS_CUDA_ARCHS={archs}")
        arguments += shlex.split(os.environ.get("CFPO_KERNELS_CMAKE_ARGS", ""))
        jobs = max_jobs()

        cmake = tool("cmake", "CMAKE_BIN_DIR")
        self.forget_other_options(folder, [cmake, *arguments])
        self.run_cmake(cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *arguments)
        self.run_cmake(cmake, "--build", str(folder), "--parallel", jobs)

        (built,) = folder.glob("_C*.so")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Replaced, not overwritten: a running process may have the old file mapped.
        target.unlink(missing_ok=True)
        shutil.copy2(built, target)

    def build_type(self):
        default = "Debug" if self.debug else "Release"
        return one_of("CFPO_KERNELS_BUILD_TYPE", default, ("Release", "RelWithDebInfo", "Debug"))

    @staticmethod
    def forget_other_options(folder, arguments):
        """Starts afresh when an option changed: CMake's cache would keep the old value of some."""
        names = COMPILER_VARIABLES + CUDA_VARIABLES
        environment = {name: os.environ.get(name) for name in names}
        key = json.dumps([arguments, environment, shutil.which("nvcc")], indent=1)
        record = folder / "options.json"
        if not record.exists() or record.read_text() != key:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            record.write_text(key)

    @staticmethod
    def run_cmake(*command):
        status = subprocess.run(command).returncode
        if status:
            # A traceback through setuptools would bury the compiler's own message.
            raise SystemExit(f"{shlex.join(command[:3])} ... failed with exit status {status}")


native = one_of("CFPO_KERNELS_NATIVE", "ON", ("ON", "OFF")) == "ON"

setup(
    ext_modules=[Extension("cfpo_kernels._C", sources=[])] if native else [],
    cmdclass={"build_ext": CMakeBuild},
    # The folder triton_kernels is installed inside the package: an unrelated distribution owns
    # that name at the top level.
    packages=find_packages(include=["cfpo_kernels", "cfpo_kernels.*"])
    + [
        f"cfpo_kernels.{name}"
        for name in find_packages(include=["triton_kernels", "triton_kernels.*"])
    ],
    package_dir={"cfpo_kernels.triton_kernels": "triton_kernels"},
    zip_safe=False,
)
