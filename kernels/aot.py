"""Compiles the kernels for GPUs that need not be there: ``python -m h2rec.kernels.aot [--json FILE] [OPERATOR ...]``.

The module of an operator's kernels has a function ``representative_calls()``, which gives labels and calls of its
launchers on meta tensors. They run here against a driver that stands for a GPU: Triton specialises and compiles what
they launch just as it would there, and launches nothing. One line for each kernel, call and target; the exit status
is 1 if a kernel spills registers. ``--json`` writes the same lines as a list of :class:`Compiled`.

Not with ``TRITON_INTERPRET=1``, under which there is nothing to compile.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

OPERATORS = ("harmonized_embedding", "alignment_loss")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What became of one kernel."""

    kernel: str
    call: str
    target: str
    registers: int  # of a thread; on AMD the larger of the vector and the scalar ones
    spilled_bytes: int  # of a thread, in memory
    shared_bytes: int  # of a block
    wide_loads: int  # instructions that load 16 bytes a thread from global memory
    matrix_instructions: int


class _AbsentGPU:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> GPUTarget:  # by which Triton keeps compiled kernels apart
        return self._target

    def get_current_stream(self, device: GPUTarget) -> int:
        return 0


@contextlib.contextmanager
def _compiling_for(target: GPUTarget) -> Iterator[list]:
    """Kernels that are launched in the block are compiled for ``target`` instead, and listed."""
    compiled = []
    run = JITFunction.run

    def compile_only(self, *args, warmup, **kwargs):
        kernel = run(self, *args, warmup=True, **kwargs)
        if not any(kernel is known for known in compiled):
            compiled.append(kernel)
        return kernel

    with mock.patch.object(JITFunction, "run", compile_only):
        triton.runtime.driver.set_active(_AbsentGPU(target))
        yield compiled


def compile_operator(operator: str, target_name: str) -> Iterator[Compiled]:
    """What the representative calls of ``operator`` launch, compiled for one of TARGETS."""
    module = importlib.import_module(f"h2rec.kernels.{operator}")
    inspect = _inspect_amd if TARGETS[target_name].backend == "hip" else _inspect_nvidia
    for label, call in module.representative_calls().items():
        with _compiling_for(TARGETS[target_name]) as kernels:
            call()
        for kernel in kernels:
            yield Compiled(
                kernel.name,
                label,
                target_name,
                shared_bytes=kernel.metadata.shared,
                **inspect(kernel.asm),
            )


def _inspect_nvidia(assembly) -> dict[str, int]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(assembly["cubin"])
        file.flush()
        command = [tools / "cuobjdump", "-res-usage", "-sass", file.name]
        environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}  # of nvdisasm
        listing = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    uses_stack = re.search(r"\b(?:STL|LDL)\b", listing)  # else a frame may be there, and nothing in it
    return {
        "registers": int(re.search(r"\bREG:(\d+)", listing)[1]),
        "spilled_bytes": int(re.search(r"\bSTACK:(\d+)", listing)[1]) if uses_stack else 0,
        "wide_loads": len(re.findall(r"\b(?:LDG|LDGSTS)\.E\S*\.128\b", listing)),
        "matrix_instructions": len(re.findall(r"\b(?:[HD]MMA|HGMMA|UTC\w*MMA)\b", listing)),
    }


def _inspect_amd(assembly) -> dict[str, int]:
    listing = assembly["amdgcn"]

    def metadata(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", listing)[1])

    return {
        "registers": max(metadata("vgpr_count"), metadata("sgpr_count")),
        "spilled_bytes": metadata("private_segment_fixed_size"),
        "wide_loads": len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", listing)),
        "matrix_instructions": len(re.findall(r"\bv_mfma_\w+", listing)),
    }


_COLUMNS = "{:<34}{:<34}{:<8}{:>10}{:>8}{:>8}{:>12}{:>8}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m h2rec.kernels.aot", description=__doc__.split(":")[0])
    parser.add_argument(
        "operators", nargs="*", metavar="OPERATOR", help=f"of {', '.join(OPERATORS)}; default: all"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the lines there as well")
    arguments = parser.parse_args()
    if unknown := set(arguments.operators) - set(OPERATORS):
        parser.error(f"OPERATOR must be among {', '.join(OPERATORS)}, got {', '.join(sorted(unknown))}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: what is interpreted is not compiled")
    titles = "kernel", "call", "target", "registers", "spilled", "shared", "16 B loads", "matrix"
    print(_COLUMNS.format(*titles))
    lines = []
    for operator in arguments.operators or OPERATORS:
        for target in TARGETS:
            for line in compile_operator(operator, target):
                print(_COLUMNS.format(*dataclasses.astuple(line)), flush=True)
                lines.append(dataclasses.asdict(line))
    if arguments.json:
        arguments.json.write_text(json.dumps(lines, indent=1))
    sys.exit(any(line["spilled_bytes"] for line in lines))


if __name__ == "__main__":
    main()
