"""What to install and what to compile; everything else about the package stands in pyproject.toml.

H2REC_BUILD_EXT=0     pure Python
H2REC_BUILD_EXT=1     h2rec._C and h2rec._catalog for the CPU; it is an error if they cannot be built
H2REC_BUILD_EXT=cuda  the same, and nvcc must be there
unset                 what can be built is built, and what cannot is left out
"""

import contextlib
import os
import shlex
import shutil
import sys

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

MODES = ("", "0", "1", "cuda")
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden"]
LINK_FLAGS = ["-Wl,-s"] if sys.platform.startswith("linux") else []


def read_mode():
    mode = os.environ.get("H2REC_BUILD_EXT", "")
    if mode not in MODES:
        sys.exit(f"H2REC_BUILD_EXT must be 0, 1, cuda or unset, got {mode!r}")
    return mode


def find_nvcc():
    if "NVCC" in os.environ:
        return shutil.which(os.environ["NVCC"])
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [os.path.join(home, "bin", "nvcc") for home in homes if home]
    return next(filter(None, map(shutil.which, [*candidates, "nvcc"])), None)


def torch_extension():
    """h2rec._C: registers kernels with torch; LibTorch stable ABI, Python limited API."""
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "h2rec._C",
        ["csrc/ops.cpp"],
        depends=["csrc/cpu/capability.h", "csrc/cpu/for_each_isa.h", "csrc/cpu/parallel.h"],
        py_limited_api=True,
        extra_compile_args=[*CXX_FLAGS, "-DTORCH_TARGET_VERSION=0x020a000000000000"],
        extra_link_args=LINK_FLAGS,
    )


def catalog_extension():
    """h2rec._catalog: numpy in, numpy out; knows nothing of torch, so it is built per CPython."""
    import pybind11

    return Extension(
        "h2rec._catalog",
        ["csrc/catalog/bindings.cpp", "csrc/catalog/group_codes.cpp"],
        depends=["csrc/catalog/group_codes.h"],
        include_dirs=[pybind11.get_include()],
        language="c++",
        extra_compile_args=CXX_FLAGS,
        extra_link_args=LINK_FLAGS,
    )


def choose_extensions(mode):
    """(what to build, why the others are left out)."""
    if mode == "0":
        return [], []
    compiler = shlex.split(os.environ.get("CXX") or "c++")[0]
    if shutil.which(compiler) is None:
        reason = f"there is no C++ compiler ({compiler!r} was not found)"
        if mode:
            sys.exit(f"H2REC_BUILD_EXT={mode}, but {reason}")
        return [], [f"h2rec._C and h2rec._catalog: {reason}"]
    extensions, left_out = [], []
    for name, make in (("h2rec._C", torch_extension), ("h2rec._catalog", catalog_extension)):
        try:
            extensions.append(make())
        except ImportError as error:
            if mode:
                raise
            left_out.append(f"{name}: {error}")
    return extensions, left_out


def build_command(base, mode, nvcc):
    """`base`, which says what it builds, and goes on when that fails unless `mode` asks for it."""

    class BuildExtensions(base):
        def run(self):
            names = " and ".join(extension.name for extension in self.extensions)
            cuda = f"; nvcc is {nvcc}, but this version has no CUDA code to compile" if nvcc else ""
            print(f"h2rec: building {names} (CPU{cuda})", flush=True)
            super().run()

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                self.leave_out(self.extensions, error)

        def build_extension(self, extension):
            try:
                super().build_extension(extension)
            except Exception as error:
                self.leave_out([extension], error)

        def leave_out(self, extensions, error):
            if mode:
                raise error
            for extension in extensions:  # an older build must not take its place
                with contextlib.suppress(FileNotFoundError):
                    os.remove(self.get_ext_fullpath(extension.name))
            names = " and ".join(extension.name for extension in extensions)
            warn(f"{names}: {type(error).__name__}: {error}")

    return BuildExtensions


def warn(left_out):
    print(f"h2rec: NOT built, and h2rec works without it: {left_out}", file=sys.stderr, flush=True)


mode = read_mode()
nvcc = find_nvcc() if mode == "cuda" else None
if mode == "cuda" and nvcc is None:
    sys.exit("H2REC_BUILD_EXT=cuda, but there is no nvcc: set NVCC or CUDA_HOME, or put nvcc on the PATH")
extensions, left_out = choose_extensions(mode)
for extension in extensions:
    extension.optional = not mode  # setuptools then does not look for the file of one that was left out
for reason in left_out:
    warn(reason)

base = build_ext
if any(extension.name == "h2rec._C" for extension in extensions):
    from torch.utils.cpp_extension import BuildExtension as base  # ninja, and torch's own flags

setup(
    packages=[
        *find_packages(include=["h2rec", "h2rec.*"]),
        "h2rec.kernels",
        *(f"h2rec.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"h2rec.kernels": "kernels"},
    include_package_data=False,  # modules only: the README in kernels/ is for who reads the tree
    ext_modules=extensions,
    cmdclass={"build_ext": build_command(base, mode, nvcc)},
)
