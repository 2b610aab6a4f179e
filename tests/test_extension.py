"""h2rec._C: what it registers, and that it and the Python side share a namespace in either order."""

import importlib.util
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if os.environ.get("H2REC_BUILD_EXT") == "0":
    pytest.skip("h2rec was asked to be built without extensions", allow_module_level=True)

EXTENSION = importlib.util.find_spec("h2rec._C").origin

LOAD_BOTH = """
import importlib.util
import sys
import torch

def extension():
    spec = importlib.util.spec_from_file_location("h2rec._C", sys.argv[1])
    spec.loader.exec_module(importlib.util.module_from_spec(spec))

def library():
    global kept
    kept = torch.library.Library("h2rec", "DEF")
    kept.define("twice(Tensor x) -> Tensor")
    kept.impl("twice", lambda x: 2 * x, "CPU")

for load in sys.argv[2:]:
    globals()[load]()
assert torch.ops.h2rec.twice(torch.ones(1)).item() == 2
print(torch.ops.h2rec.cpu_capability())
"""


CAPABILITIES = ["portable", "avx2", "avx512", "avx512vnni"]


@pytest.fixture(scope="module")
def capability() -> str:
    importlib.import_module("h2rec._C")
    return torch.ops.h2rec.cpu_capability()


def test_one_binary_for_every_python():
    name = Path(EXTENSION).name
    assert re.fullmatch(r"_C\.abi3\.so", name), name


def test_cpu_capability(capability: str):
    assert capability in CAPABILITIES
    if platform.machine() != "x86_64":
        assert capability == "portable"


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux lists what the processor can do")
def test_cpu_capability_is_that_of_this_processor(capability: str):
    flags = set(
        re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split()
    )
    if {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= flags:
        assert capability == ("avx512vnni" if "avx512_vnni" in flags else "avx512")
    elif {"avx2", "fma"} <= flags:
        assert capability == "avx2"
    else:
        assert capability == "portable"


@pytest.mark.parametrize("asked", [*CAPABILITIES, "more than there is"])
def test_cpu_capability_can_be_lowered(asked: str, capability: str):
    code = "import torch, h2rec._C; print(torch.ops.h2rec.cpu_capability())"
    environment = os.environ | {"H2REC_CPU_CAPABILITY": asked}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    lower = asked in CAPABILITIES[: CAPABILITIES.index(capability)]
    assert result.stdout.strip() == (asked if lower else capability)


@pytest.mark.parametrize("order", [("extension", "library"), ("library", "extension")], ids="-".join)
def test_shares_the_namespace_with_python(order: tuple[str, str], capability: str):
    command = [sys.executable, "-c", LOAD_BOTH, EXTENSION, *order]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == capability


def test_needs_neither_this_torch_nor_this_python():
    """Only symbols of the stable interfaces: C functions of Python's limited API and of torch's shims."""
    listing = subprocess.run(["nm", "-D", "-u", EXTENSION], capture_output=True, text=True, check=True).stdout
    undefined = [line.split()[-1] for line in listing.splitlines()]
    assert "torch_library_impl" in undefined
    assert [name for name in undefined if re.search(r"_Z\w*?NK?(2at|3c10|5torch)\d", name)] == []
