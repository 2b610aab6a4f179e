"""The source distribution, the wheel that is built from it, and what setup.py does when it cannot compile."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PYTHON_TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"

BUILD = "import sys\nfrom setuptools import build_meta\nprint(getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2]))"


def build(
    kind: str, source: Path, out: Path, *, succeeds: bool = True, **environment: str | None
) -> tuple[Path, str]:
    """Builds an sdist or a wheel as pip would, without isolation; returns the file and everything printed."""
    # CUDA code takes long to compile; tests/cuda does it once.
    variables = {"H2REC_BUILD_EXT": None, "MAX_JOBS": "2", "NVCC": "no-such-nvcc", **environment}
    merged = {name: value for name, value in {**os.environ, **variables}.items() if value is not None}
    out.mkdir(exist_ok=True)
    result = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(out)],
        cwd=source,
        env=merged,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert (result.returncode == 0) == succeeds, result.stdout
    return out / result.stdout.splitlines()[-1], result.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution, made from a copy so that the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(
        ROOT,
        folder / "checkout",
        ignore=shutil.ignore_patterns(
            ".git", ".venv*", "build", "dist", "runs", "*.egg-info", "__pycache__", ".*_cache"
        ),
    )
    archive, _ = build("sdist", folder / "checkout", folder / "dist", H2REC_BUILD_EXT="0")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def pure_wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", sdist, tmp_path_factory.mktemp("pure") / "dist", H2REC_BUILD_EXT="0")[0]


@pytest.fixture(scope="module")
def metadata(pure_wheel: Path) -> Message:
    with zipfile.ZipFile(pure_wheel) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(wheel.read(name).decode())


def modules_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as opened:
        return {name for name in opened.namelist() if name.startswith("h2rec/")}


def expected_modules() -> set[str]:
    """Every module of the checkout, where the wheel should have it."""
    modules = {path.relative_to(ROOT) for path in ROOT.glob("h2rec/**/*.py")}
    modules |= {"h2rec" / path.relative_to(ROOT) for path in ROOT.glob("kernels/**/*.py")}
    return {path.as_posix() for path in modules}


def run_installed(wheel: Path, folder: Path, script: str) -> str:
    """Installs the wheel into an empty folder and runs the script against it, far from the checkout."""
    installed, elsewhere = folder / "installed", folder / "elsewhere"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(installed), str(wheel)], check=True)
    elsewhere.mkdir()
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), *dependencies])}
    script = f"import h2rec\nassert h2rec.__file__.startswith({str(installed)!r}), h2rec.__file__\n{script}"
    command = [sys.executable, "-S", "-c", script]  # -S: an editable install would lend its modules
    result = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_wheel_has_every_module_and_nothing_else(pure_wheel: Path):
    assert modules_of(pure_wheel) == expected_modules()
    assert pure_wheel.name.endswith("-py3-none-any.whl")


def test_metadata(metadata: Message, pure_wheel: Path):
    assert metadata["Name"] == "h2rec"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    with zipfile.ZipFile(pure_wheel) as wheel:
        licence = next(name for name in wheel.namelist() if name.endswith("licenses/LICENSE"))
        assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()


def test_core_dependencies_stay_few(metadata: Message):
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    core = {requirement.name for requirement in requirements if "extra" not in str(requirement.marker)}
    assert core == {"torch", "numpy", "safetensors", "triton"}


def test_every_dependency_that_make_installs_is_pinned_within_its_range(metadata: Message):
    extras = ["", *re.search(r"--editable '\.\[(.+)\]'", (ROOT / "Makefile").read_text())[1].split(",")]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {requirement.name.lower(): requirement for requirement in map(Requirement, lines)}
    for requirement in map(Requirement, metadata.get_all("Requires-Dist")):
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        pin = pins[requirement.name.lower()]
        if requirement.name != "triton":  # stays a range, see constraints.txt
            (specifier,) = pin.specifier
            assert specifier.operator == "=="
            assert requirement.specifier.contains(specifier.version), requirement
        else:
            assert pin.specifier == requirement.specifier


def test_a_pure_install_works_away_from_the_checkout(pure_wheel: Path, tmp_path: Path):
    script = """
import importlib.metadata, importlib.util
import h2rec.kernels
assert h2rec.kernels.__file__.startswith(h2rec.__file__.removesuffix("__init__.py"))
assert importlib.util.find_spec("h2rec._C") is importlib.util.find_spec("h2rec._catalog") is None
assert importlib.metadata.version("h2rec") == h2rec.__version__
(command,) = importlib.metadata.distribution("h2rec").entry_points
assert (command.group, command.name) == ("console_scripts", "h2rec")
assert callable(command.load())
h2rec.show_config()
"""
    assert "h2rec._C cannot be imported" in run_installed(pure_wheel, tmp_path, script)


@pytest.fixture(scope="module")
def compiled(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A source folder in which the extensions were built, the wheel, and what the build printed."""
    source = tmp_path_factory.mktemp("compiled") / "source"
    shutil.copytree(sdist, source)
    return source, *build("wheel", source, source / "dist", H2REC_BUILD_EXT="1")


def test_extensions_from_the_source_distribution(compiled: tuple[Path, Path, str], tmp_path: Path):
    _, wheel, output = compiled
    assert output.count("h2rec:") == 1
    assert "h2rec: building h2rec._C and h2rec._catalog (CPU)" in output
    # _C would serve every CPython, _catalog serves one, and so does the wheel.
    assert f"-{PYTHON_TAG}-{PYTHON_TAG}-" in wheel.name
    binaries = {name for name in modules_of(wheel) if not name.endswith(".py")}
    assert modules_of(wheel) - binaries == expected_modules()
    assert sorted(name.split(".")[0] for name in binaries) == ["h2rec/_C", "h2rec/_catalog"]
    script = """
import numpy, torch
import h2rec._C, h2rec._catalog
print(torch.ops.h2rec.cpu_capability())
h2rec._catalog.group_codes(numpy.zeros((3, 2), dtype=numpy.int32))
"""
    assert run_installed(wheel, tmp_path, script).strip() in {"avx512vnni", "avx512", "avx2", "portable"}


FAILS_TO_COMPILE = """#!/bin/sh
case "$*" in
  *-dumpversion*) echo 12.2.0 ;;
  *-v) echo COLLECT_GCC=g++ ;;
  *) exit 1 ;;
esac
"""


@pytest.mark.parametrize("fails", ["always", "when it compiles"])
def test_a_compiler_that_fails_leaves_the_extensions_out(
    compiled: tuple[Path, Path, str], tmp_path: Path, fails: str
):
    compiler = tmp_path / "c++"
    compiler.write_text(FAILS_TO_COMPILE if fails == "when it compiles" else "#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    source = tmp_path / "source"
    shutil.copytree(compiled[0], source)  # with older binaries, which must not be taken for new ones
    shutil.rmtree(next((source / "build").glob("temp.*")))
    wheel, output = build("wheel", source, tmp_path / "dist", CXX=str(compiler))
    assert modules_of(wheel) == expected_modules()
    told = " ".join(re.findall(r"^h2rec: NOT built, (.*)$", output, re.M))
    assert told.count("h2rec._C") == told.count("h2rec._catalog") == 1


def test_without_a_compiler_it_installs_pure_and_says_so(sdist: Path, tmp_path: Path):
    wheel, output = build("wheel", sdist, tmp_path, CXX="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert modules_of(wheel) == expected_modules()
    assert re.search(r"NOT built.*h2rec\._C and h2rec\._catalog.*'no-such-compiler' was not found", output)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"H2REC_BUILD_EXT": "yes"}, "H2REC_BUILD_EXT must be 0, 1, cuda or unset, got 'yes'"),
        ({"H2REC_BUILD_EXT": "1", "CXX": "no-such-compiler"}, "'no-such-compiler' was not found"),
        ({"H2REC_BUILD_EXT": "1", "CXX": "/bin/false"}, "/bin/false"),
        (
            {"H2REC_BUILD_EXT": "cuda", "NVCC": "no-such-nvcc"},
            "H2REC_BUILD_EXT=cuda, but there is no nvcc",
        ),
        (
            {"H2REC_BUILD_EXT": "cuda", "NVCC": "/bin/true"},
            "/bin/true has no libcudart_static.a",
        ),
    ],
    ids=["unknown", "no compiler", "failing compiler", "no nvcc", "nvcc that is none"],
)
def test_what_was_asked_for_and_cannot_be_is_an_error(
    sdist: Path, tmp_path: Path, environment: dict, message: str
):
    _, output = build("wheel", sdist, tmp_path, succeeds=False, **environment)
    assert message in output
