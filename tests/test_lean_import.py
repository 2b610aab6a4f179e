"""`import h2rec` is cheap, touches nothing of the machine, and needs nothing but torch, numpy and safetensors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import h2rec

INSTALLED = Path(h2rec.__file__).parents[1]

# The dependencies may read and probe what they like: they are imported before the watch begins.
WATCH = """
import os, site, sys, sysconfig
import numpy, torch, safetensors.torch

inside = [sysconfig.get_path("stdlib"), sys.prefix, sys.base_prefix, *site.getsitepackages()]
inside += [os.path.realpath(path) for path in sys.path if os.path.isdir(os.path.join(path, "h2rec"))]
inside = tuple(os.path.join(os.path.realpath(path), "") for path in inside)
seen = []

def watch(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)):
        path, mode = os.path.realpath(os.fsdecode(args[0])), args[1] or "r"
        if not path.startswith(inside) or set(mode) & set("wax+"):
            seen.append(f"{event} {path} {mode}")
    elif event.startswith(("subprocess.", "os.system", "socket.", "os.exec", "os.posix_spawn", "os.fork")):
        seen.append(f"{event} {args}")
    elif event == "ctypes.dlopen":
        seen.append(f"{event} {args}")

sys.addaudithook(watch)
"""


def run(script: str) -> str:
    """What a fresh Python prints; without the interpreter of Triton that conftest.py asks for."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-B", "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=INSTALLED)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("module", ["h2rec", "h2rec.layers", "h2rec.ops", "h2rec.semantic_ids"])
def test_touches_only_its_own_files(module: str):
    assert run(f"{WATCH}\nimport {module}\nprint(*seen, sep='\\n')").strip() == ""


def test_the_watch_sees(tmp_path: Path):
    """The test above would notice a file elsewhere, a written file, and a process."""
    elsewhere, own = tmp_path / "cache.json", Path(__file__)
    elsewhere.write_text("{}")
    script = f"open({str(elsewhere)!r}).close()\nopen({str(own)!r}).close()\n"
    script += "import subprocess\nsubprocess.run(['true'])\nprint(*seen, sep='\\n')"
    lines = run(f"{WATCH}\n{script}").splitlines()
    assert f"open {elsewhere} r" in lines
    assert any(line.startswith("subprocess.Popen") for line in lines)
    assert not any(str(own) in line for line in lines)


@pytest.mark.parametrize("module", ["h2rec", "h2rec.layers"])
def test_imports_no_extra(module: str):
    script = f"""
import sys
import torch, safetensors.torch
before = set(sys.modules)
import {module}
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(*sorted(new - sys.stdlib_module_names))
print(torch.cuda.is_initialized())
"""
    packages, initialized = run(script).splitlines()
    assert set(packages.split()) <= {"h2rec", "torch", "numpy", "safetensors"}
    assert initialized == "False"


BLOCKED = """
import sys
for name in ("h2rec._C", "h2rec._catalog", "triton"):
    sys.modules[name] = None
"""


def test_works_without_extensions_and_triton():
    script = f"""{BLOCKED}
import h2rec, torch
from h2rec import layers, ops
torch.manual_seed(0)
sids = h2rec.SemanticIds(torch.tensor([[0, 1], [1, 0], [0, 1]]), codebook_sizes=(2, 2))
assert sids.stats().largest_group == 2
layer = layers.HarmonizedEmbedding(sids, 4)
layer(torch.tensor([[0, 2]])).sum().backward()
assert all(parameter.grad is not None for parameter in layer.parameters())
ops.residual_quantize(torch.randn(5, 4), torch.randn(2, 3, 4))
h2rec.show_config()
"""
    report = run(script)
    assert "h2rec._C cannot be imported" in report
    assert "reference usable" in " ".join(report.split())
