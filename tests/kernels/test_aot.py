"""What compilers make of the Triton kernels for GPUs that are not here. New kernels are covered by themselves."""

import json
import os
import re
import subprocess
import sys

import pytest

aot = pytest.importorskip("h2rec.kernels.aot", reason="triton is not installed")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[aot.Compiled]:
    """All of it, from a process without the interpreter."""
    file = tmp_path_factory.mktemp("aot") / "compiled.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "h2rec.kernels.aot", "--json", str(file)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [aot.Compiled(**line) for line in json.loads(file.read_text())]
    assert len(result.stdout.splitlines()) == 1 + len(lines)
    return lines


def test_every_kernel_compiles_for_every_target_without_spills(compiled):
    targets_by_call = {}
    for line in compiled:
        targets_by_call.setdefault((line.kernel, line.call), set()).add(line.target)
        assert line.spilled_bytes == 0, line
        assert line.registers > 0, line
    assert all(targets == set(aot.TARGETS) for targets in targets_by_call.values())


@pytest.mark.parametrize(
    "kernel",
    [
        "_harmonized_embedding_fwd_kernel",
        "_one_hot_sums_kernel",
        "_add_splits_kernel",
        "_sum_pieces_kernel",
        "_join_pieces_kernel",
    ],
)
def test_rows_are_read_16_bytes_at_a_time(kernel, compiled):
    of_kernel = [line for line in compiled if line.kernel == kernel]
    assert of_kernel
    assert [line for line in of_kernel if line.wide_loads == 0] == []


def test_one_hot_products_run_on_matrix_units(compiled):
    products = [line for line in compiled if line.kernel == "_one_hot_sums_kernel"]
    assert products
    assert [line for line in products if line.matrix_instructions == 0] == []


def test_products_are_matrix_instructions(compiled):
    lines = [line for line in compiled if re.match(r"_alignment_loss_\w+_kernel", line.kernel)]
    assert lines
    for line in lines:
        if "D=768" not in line.call:  # those products are the library's
            assert line.matrix_instructions > 0, line


def test_a_spill_is_an_error(monkeypatch, capsys):
    line = aot.Compiled("kernel", "call", "sm_90", 255, 8, 0, 0, 0)
    monkeypatch.setattr(aot, "compile_operator", lambda operator, target: [line])
    monkeypatch.setattr(sys, "argv", ["aot"])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as exit_:
        aot.main()
    assert exit_.value.code == 1
    assert "kernel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "interpret", "message"),
    [
        (["unknown"], "0", "OPERATOR must be among harmonized_embedding.*, got unknown"),
        ([], "1", "TRITON_INTERPRET=1 is set"),
    ],
)
def test_bad_input(arguments, interpret, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["aot", *arguments])
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    with pytest.raises(SystemExit) as exit_:
        aot.main()
    assert exit_.value.code == 2
    assert re.search(message, capsys.readouterr().err)
