"""The layers in two processes under DistributedDataParallel."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "layers_in_ranks.py"
CHECKS = re.findall(r"^@check\ndef (\w+)", SCRIPT.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the processes print; they are started once for all checks."""
    rendezvous = tmp_path_factory.mktemp("ranks") / "rendezvous"
    result = subprocess.run([sys.executable, SCRIPT, rendezvous], capture_output=True, text=True, timeout=300)
    return result.stdout + result.stderr


@pytest.mark.parametrize("check", CHECKS)
def test_in_two_processes(check: str, output: str):
    assert f"{check}: passed" in output, output
