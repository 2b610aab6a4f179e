"""What to install and what to compile; everything else about the package stands in pyproject.toml.

H2REC_BUILD_EXT=0     pure Python
H2REC_BUILD_EXT=1     h2rec._C and h2rec._catalog for the CPU; it is an error if they cannot be built
H2REC_BUILD_EXT=cuda  the same, and nvcc must be there
unset                 what can be built is built, and what cannot is left out

Where it is unset, CUDA code is part of h2rec._C whenever nvcc is there.
"""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

MODES = ("", "0", "1", "cuda")
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden"]
CUDA_SOURCE = "csrc/cuda/residual_quantize.cu"
CUDA_HEADERS = [
    f"csrc/cuda/{name}.h"
    for name in ("device", "load_store", "products", "residual_quantize", "rows", "warp")
]
NVCC_FLAGS = [
    *("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "2"),
    *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90, 100)),
    "-gencode=arch=compute_100,code=compute_100",  # PTX, for devices that are yet to come
]
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


def cuda_libraries(nvcc):
    """Where libcudart_static.a of this nvcc is; nvcc may be a wrapper that lies elsewhere."""
    command = [nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null", "-o", os.devnull]
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    tops = [line.split("=", 1)[1].strip() for line in output.splitlines() if line.startswith("#$ TOP=")]
    folders = [
        os.path.join(top, name) for top in tops for name in ("lib64", "lib", "targets/x86_64-linux/lib")
    ]
    return next((f for f in folders if os.path.exists(os.path.join(f, "libcudart_static.a"))), None)


def add_cuda(extension, nvcc, build_temp):
    """Compiles the device code without torch, and links it and a static CUDA runtime into `extension`."""
    libraries = cuda_libraries(nvcc)
    if libraries is None:
        raise RuntimeError(f"{nvcc} has no libcudart_static.a")
    os.makedirs(build_temp, exist_ok=True)
    compiled = os.path.abspath(os.path.join(build_temp, "residual_quantize.cu.o"))
    subprocess.run([nvcc, *NVCC_FLAGS, "-c", CUDA_SOURCE, "-o", compiled], check=True)
    extension.extra_objects.append(compiled)
    extension.library_dirs.append(libraries)
    extension.libraries += ["cudart_static", "rt", "dl", "pthread"]
    extension.extra_compile_args.append("-DH2REC_WITH_CUDA")


def torch_extension():
    """h2rec._C: registers kernels with torch; LibTorch stable ABI, Python limited API."""
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "h2rec._C",
        [
            "csrc/ops.cpp",
            "csrc/cpu/alignment_loss.cpp",
            "csrc/cpu/harmonized_embedding.cpp",
            "csrc/cpu/item_rows.cpp",
            "csrc/cpu/residual_quantize.cpp",
            "csrc/cpu/sorted_rows.cpp",
        ],
        depends=[
            *("csrc/cpu/capability.h", "csrc/cpu/for_each_isa.h", "csrc/cpu/parallel.h"),
            *("csrc/cpu/alignment_loss.h", "csrc/cpu/alignment_loss.inl", "csrc/cpu/alignment_tiles.h"),
            *("csrc/cpu/harmonized_embedding.h", "csrc/cpu/harmonized_embedding.inl"),
            *("csrc/cpu/floating.h", "csrc/cpu/item_rows.h", "csrc/cpu/sorted_rows.h"),
            *("csrc/cpu/residual_quantize.h", "csrc/cpu/residual_quantize.inl"),
            "csrc/cpu/residual_quantize_coarse.inl",
            *(CUDA_SOURCE, *CUDA_HEADERS),
        ],
        py_limited_api=True,
        extra_compile_args=[*CXX_FLAGS, "-DTORCH_TARGET_VERSION=0x020a000000000000"],
        extra_link_args=LINK_FLAGS,
    )


def catalog_extension():
    """h2rec._catalog: numpy in, numpy out; knows nothing of torch, so it is built per CPython."""
    import pybind11

    return Extension(
        "h2rec._catalog",
        [
            "csrc/catalog/bindings.cpp",
            "csrc/catalog/co_occurrence.cpp",
            "csrc/catalog/group_codes.cpp",
            "csrc/catalog/place_items.cpp",
        ],
        depends=[f"csrc/catalog/{name}.h" for name in ("co_occurrence", "group_codes", "place_items")],
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
            cuda = f" and CUDA, with {nvcc}" if nvcc else ""
            print(f"h2rec: building {names} (CPU{cuda})", flush=True)
            super().run()

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                self.leave_out(self.extensions, error)

        def build_extension(self, extension):
            try:
                if extension.name == "h2rec._C" and nvcc:
                    self.build_cuda(extension)
                super().build_extension(extension)
            except Exception as error:
                self.leave_out([extension], error)

        def build_cuda(self, extension):
            try:
                add_cuda(extension, nvcc, self.build_temp)
            except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
                if mode == "cuda":
                    raise
                warn(f"the CUDA kernels: {error}")

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
nvcc = find_nvcc() if mode in ("", "cuda") else None
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
