"""What backend="auto" takes, on a simulated GPU: CPU tensors, and kernels that run on the CPU."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import simulated
import torch
from fake_native import FakeNative
from limits import HANGS_AFTER
from repository import ROOT, SUPPORT
from targets import Target as Running

import cfpo_kernels
from cfpo_kernels import backends
from cfpo_kernels.backends import cpu, cuda, triton
from cfpo_kernels.verification import choice, records, run, targets
from cfpo_kernels.verification.records import Timing, Verdict, VerifyRecord

README = ROOT / "README.md"
BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16
CPU = torch.device("cpu")
WHY_NOT = targets.why_not


@pytest.fixture(autouse=True)
def new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CFPO_KERNELS_CACHE", str(tmp_path))
    choice.forget()
    yield
    choice.forget()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that counts as a GPU; its tensors are the CPU's."""
    device = torch.device("cpu", 0)
    monkeypatch.setattr(targets, "kind_of", lambda _: "gpu")
    monkeypatch.setattr(targets, "why_not", lambda name, device: "")
    monkeypatch.setattr(records, "identity_of", simulated.identity_of)
    return device


def timing(kernels: str, n_cols: int, ms: float, dtype: str = "bfloat16") -> Timing:
    return Timing(kernels, dtype, 8, n_cols, ms, 1.0)


def known(*verdicts: Verdict, timings: tuple[Timing, ...] = ()) -> VerifyRecord:
    return VerifyRecord(simulated.identity_of(CPU), False, list(verdicts), list(timings))


def right(*names: str, dtype: str = "bfloat16") -> list[Verdict]:
    return [Verdict(name, dtype, "right") for name in names]


# By what is known -------------------------------------------------------------------------------


def test_the_fastest_at_the_nearest_size() -> None:
    record = known(
        *right("cuda", "triton"),
        timings=(
            timing("cuda", 32000, 2.0), timing("triton", 32000, 1.0),
            timing("cuda", 151936, 3.0), timing("triton", 151936, 5.0),
        ),
    )  # fmt: skip
    sizes = {1: "triton", 32000: "triton", 50257: "triton", 100000: "cuda", 262144: "cuda"}
    for n_cols, kernels in sizes.items():
        assert choice.fastest(record, BF16, n_cols) == kernels, n_cols
    assert choice.fastest(record, F32, 32000) == "reference", "no verdict for that dtype"


def test_what_is_wrong_is_never_taken_however_fast() -> None:
    for verdict in ("wrong", "crashed", "not run"):
        record = known(
            Verdict("cuda", "bfloat16", verdict), *right("triton"),
            timings=(timing("cuda", 32000, 0.1), timing("triton", 32000, 9.0)),
        )  # fmt: skip
        assert choice.fastest(record, BF16, 32000) == "triton"
        only = known(Verdict("cuda", "bfloat16", verdict))
        assert choice.fastest(only, BF16, 32000) == "reference"


def test_without_times_the_order_of_preference() -> None:
    assert choice.fastest(known(*right("triton", "cuda-portable", "cuda")), BF16, 999) == "cuda"
    assert choice.fastest(known(*right("triton", "cuda-portable")), BF16, 9) == "cuda-portable"
    assert choice.fastest(None, BF16, 9) == "reference"


# First use --------------------------------------------------------------------------------------


@pytest.mark.only_on("cuda-source", "cuda-ptx", reason="a simulated GPU")
def test_the_whole_road(
    gpu: torch.device,
    target: Running,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """First use, battery in a child process, record, choice, and the README's first example."""
    folder = Path(target.module.__file__).parent
    monkeypatch.setenv(simulated.EMULATED, str(folder))
    monkeypatch.setenv("CFPO_KERNELS_VERIFY_TIMEOUT", "900")
    monkeypatch.setattr(sys, "path", [str(SUPPORT), *sys.path])
    monkeypatch.setattr(run, "PROVIDER", "simulated:a_gpu")
    made = {target.name: target.kernels for target in simulated.a_gpu(CPU, [*targets.NAMES["gpu"]])}
    monkeypatch.setattr(backends, "KERNELS", made)
    calls = {name: counted(kernels, monkeypatch) for name, kernels in made.items()}

    example = re.search(r"## Use\n\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert example is not None and "inplace=True" in example[1]
    g = torch.Generator().manual_seed(0)
    token_ids = torch.randint(0, 40, (3, 5), generator=g)
    weight = torch.randn(40, 8, generator=g).requires_grad_()

    class Output:
        logits = torch.randn(3, 5, 8, generator=g) @ weight.T

    old_logps = torch.log_softmax(Output.logits.detach(), -1).gather(-1, token_ids[..., None])
    exec(example[1], {
        "model": lambda _: Output, "input_ids": None, "token_ids": token_ids,
        "advantages": torch.randn(3, generator=g), "old_logps": old_logps[..., 0],
        "mask": torch.ones(3, 5),
    })  # fmt: skip
    assert weight.grad is not None and weight.grad.abs().sum() > 0

    said = capfd.readouterr().err
    assert f"first use on {simulated.NAME}" in said and "at most 900 s" in said
    record = records.load(simulated.identity_of(CPU))
    assert record is not None
    for dtype in ("bfloat16", "float32", "float16"):
        assert record.verdict("cuda", dtype) == record.verdict("triton", dtype) == "right"
        for planted in ("cuda-portable", "cuda-transient"):
            assert record.verdict(planted, dtype) == "wrong", "the planted fault"
        assert not record.verdict("triton-unrolled", dtype), "only in a long battery"
    reasons = {v.reason for v in record.verdicts if v.verdict == "wrong"}
    assert any("element in row" in reason or "gradient" in reason for reason in reasons), reasons
    # Of two right ones the faster: triton pauses 50 ms. The wrong one would have been the fastest.
    assert calls["cuda"] and not any(calls[x] for x in calls if x != "cuda")
    assert backends.resolve("auto", gpu, BF16, 40) == "cuda"
    # A new process reads the record, and runs no battery.
    choice.forget()
    monkeypatch.setattr(run, "check", None)
    assert backends.resolve("auto", gpu, F16, 151936) == "cuda"


def counted(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    function = kernels.policy_loss

    def policy_loss(*arguments: Any, **outputs: Any) -> None:
        calls.append("policy_loss")
        function(*arguments, **outputs)

    monkeypatch.setattr(kernels, "policy_loss", policy_loss, raising=False)
    return calls


@pytest.fixture
def battery(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Counts batteries instead of running them; all kernels are right."""
    ran: list[str] = []

    def check(device: torch.device, **_: Any) -> VerifyRecord:
        ran.append(str(device))
        record = known(*right("cuda"), *right("cuda", dtype="float32"))
        records.store(record)
        return record

    monkeypatch.setattr(run, "check", check)
    return ran


def test_once_a_machine(gpu: torch.device, battery: list[str]) -> None:
    for _ in range(3):
        assert backends.resolve("auto", gpu, BF16, 1000) == "cuda"
    choice.forget()
    assert backends.resolve("auto", gpu, F32, 1000) == "cuda"
    assert len(battery) == 1


def test_always(gpu: torch.device, battery: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFPO_KERNELS_VERIFY", "always")
    for _ in range(2):
        backends.resolve("auto", gpu, BF16, 1000)
        backends.resolve("auto", gpu, BF16, 1000)
        choice.forget()
    assert len(battery) == 2


def test_never(gpu: torch.device, battery: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFPO_KERNELS_VERIFY", "never")
    with pytest.warns(UserWarning, match="CFPO_KERNELS_VERIFY=never; run: python -m cfpo_kernels"):
        assert backends.resolve("auto", gpu, BF16, 1000) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.resolve("auto", gpu, BF16, 1000) == "reference"
    assert not battery
    # What was verified before still counts.
    records.store(known(*right("triton")))
    choice.forget()
    assert backends.resolve("auto", gpu, BF16, 1000) == "triton"


def test_an_unknown_mode(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFPO_KERNELS_VERIFY", "sometimes")
    with pytest.raises(ValueError, match="must be one of once, never, always, got 'sometimes'"):
        backends.resolve("auto", gpu, BF16, 1000)


def test_not_while_a_graph_is_captured(
    gpu: torch.device, battery: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    capturing = True
    monkeypatch.setattr(choice, "_is_capturing", lambda _: capturing)
    with pytest.warns(UserWarning, match="cannot be verified while a CUDA graph is captured"):
        assert backends.resolve("auto", gpu, BF16, 1000) == "reference"
    assert not battery
    capturing = False
    assert backends.resolve("auto", gpu, BF16, 1000) == "cuda", "the next eager call does it"


def test_not_while_torch_compiles(gpu: torch.device, battery: list[str]) -> None:
    def resolved(x: torch.Tensor) -> torch.Tensor:
        name = backends.resolve("auto", gpu, torch.bfloat16, 1000)
        return x + (1 if name == "reference" else 2)

    compiled = torch.compile(resolved, fullgraph=True, backend="eager")
    with pytest.warns(UserWarning, match="cannot be verified while torch.compile traces"):
        assert compiled(torch.zeros(1)) == 1
    assert not battery
    assert backends.resolve("auto", gpu, BF16, 1000) == "cuda"
    torch._dynamo.reset()
    assert compiled(torch.zeros(1)) == 2, "a record is read while tracing"


def test_a_child_that_condemned_nothing_leaves_the_next_process_a_try(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def check(device: torch.device, **_: Any) -> VerifyRecord:
        ran.append(device)
        return known(Verdict("cuda", "bfloat16", "not run", "not enough memory"))

    monkeypatch.setattr(run, "check", check)
    for process in (1, 2):
        with pytest.warns(UserWarning, match=r"cuda is not run \(not enough memory\)"):
            assert backends.resolve("auto", gpu, BF16, 1000) == "reference"
        assert backends.resolve("auto", gpu, BF16, 1000) == "reference"
        assert len(ran) == process, "once in each"
        choice.forget()


def test_each_choice_is_told_once_under_debug(
    gpu: torch.device,
    battery: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    backends.resolve("auto", gpu, BF16, 1000)
    capfd.readouterr()
    monkeypatch.setenv("CFPO_KERNELS_DEBUG", "1")
    for _ in range(2):
        backends.resolve("auto", gpu, BF16, 1000)
    told = capfd.readouterr().err
    assert told.count("cuda for torch.bfloat16 logits, V = 1000") == 1
    assert "right by the record" in told


def test_choices_on_a_cpu_are_told_with_their_reason(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    backends.resolve("auto", CPU, BF16, 1000)
    assert not capfd.readouterr().err
    monkeypatch.setenv("CFPO_KERNELS_DEBUG", "1")
    choice.forget()
    for name, n_cols in (("auto", 1000), ("auto", 2000), ("cpu", 5), ("reference", 5)) * 2:
        backends.resolve(name, CPU, BF16, n_cols)
    backends.resolve("auto", torch.device("meta"), BF16, 1000)
    told = capfd.readouterr().err.splitlines()
    best = cpu.native.cpu_levels()[0]
    assert told == [
        f"cfpo_kernels: cpu for torch.bfloat16 logits on cpu: up to {best}; the CPU's kernels need "
        "no record",
        f"cfpo_kernels: cpu for logits on cpu: up to {best}; backend='cpu' asks for it",
        "cfpo_kernels: reference for logits on cpu: backend='reference' asks for it",
        "cfpo_kernels: reference for torch.bfloat16 logits on meta: there are no kernels for meta "
        "tensors",
    ]


# Where kernels cannot run -----------------------------------------------------------------------


def test_a_driver_that_is_too_old_for_cuda_leaves_triton(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CUDA module cannot start; what torch brought along can, and so can Triton."""

    class OldDriver(FakeNative):
        build_id = "0"

        def cuda_query(self) -> dict[str, Any]:
            return {
                "status": 35,
                "status_name": "cudaErrorInsufficientDriver",
                "status_text": "CUDA driver version is insufficient for CUDA runtime version",
                "runtime_version": 13000,
                "driver_version": 12080,
                "devices": [],
            }

    native = OldDriver("A GPU", 9, 0)
    monkeypatch.setattr(cuda, "native", native)
    real = targets.backend_of
    monkeypatch.setattr(
        targets, "why_not", lambda n, d: cuda.status().detail if real(n) == "cuda" else ""
    )
    asked: list[str] = []

    def process_check(request: Any, on_event: Any) -> Any:
        asked.extend(request.kernels)
        verdicts = [Verdict(k, d, "right") for k, d in request.pairs()]
        return run.process.Found(simulated.identity_of(CPU), verdicts)

    monkeypatch.setattr(run.process, "check", process_check)
    assert backends.resolve("auto", gpu, BF16, 1000) == "triton"
    assert asked == ["triton"]
    assert "insufficient" in cfpo_kernels.available_backends()["cuda"].detail


def test_no_kernels_at_all(
    gpu: torch.device, battery: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "why_not", lambda name, device: f"no {name} here")
    with pytest.warns(UserWarning, match=r"no kernels can run on it \(cuda: no cuda-portable"):
        assert backends.resolve("auto", gpu, BF16, 1000) == "reference"
    assert not battery, "there is nothing to check"


# In place, as a permission ----------------------------------------------------------------------


def loss_in_place(**options: Any) -> torch.Tensor:
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before = x.detach().clone()
    loss = cfpo_kernels.cfpo_loss(
        x * 1.0, torch.tensor([1, 2, 3]), torch.ones(3), inplace=True, **options
    )
    loss.backward()
    assert x.grad is not None and torch.equal(x.detach(), before)
    return x.grad


def test_in_place_is_a_permission_under_auto(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = loss_in_place(backend="cpu")
    monkeypatch.setenv("CFPO_KERNELS_VERIFY", "never")
    with pytest.warns(UserWarning, match="plain torch computes the loss on cpu; inplace=True is "
                      "not used"):  # fmt: skip
        got = loss_in_place()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_in_place()
    with pytest.raises(ValueError, match=r"not backend='reference'.*'auto' takes it as a"):
        loss_in_place(backend="reference")


def test_no_warning_where_nothing_was_to_be_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices that no kernels exist for are slower, and nobody promised otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.resolve("auto", torch.device("mps"), BF16, 1000) == "reference"
    with pytest.warns(UserWarning, match="on mps; inplace=True is not used: there are no kernels"):
        backends.resolve("auto", torch.device("mps"), BF16, 1000, inplace=True)


def test_without_the_native_module_one_warning_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "native", None)
    monkeypatch.setattr(cpu, "import_failure", "the native module could not be imported: no file")
    with pytest.warns(UserWarning, match="plain torch computes the loss on cpu.*no file"):
        assert backends.resolve("auto", CPU, F32, 1000) == "reference"
    assert "no file" in cfpo_kernels.available_backends()["cpu"].detail


HALTED = 'sys.modules["cfpo_kernels._C"] = None'
BROKEN = """
class Finder:
    def find_spec(name, *_):
        if name == "cfpo_kernels._C":
            return importlib.util.spec_from_file_location(name, sys.argv[1])
sys.meta_path.insert(0, Finder)
"""
MISSING = """
import torch, cfpo_kernels
from cfpo_kernels.verification import report
logits, ids = torch.zeros(2, 9, requires_grad=True), torch.arange(2)
said = {"available_backends": cfpo_kernels.available_backends()["cpu"].detail}
for how in ({}, {"inplace": True}, {"backend": "cpu"}):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):  # the second time nothing is said, or the same is raised
            with contextlib.suppress(cfpo_kernels.BackendUnavailableError):
                cfpo_kernels.cfpo_loss(logits * 1.0, ids, torch.ones(2), **how)
    said[str(how)] = [str(w.message) for w in seen]
try:
    cfpo_kernels.cfpo_loss(logits, ids, torch.ones(2), backend="cpu")
except cfpo_kernels.BackendUnavailableError as error:
    said["cpu"] = str(error)
with contextlib.redirect_stdout(io.StringIO()) as printed:
    report.print_info()
said["info"] = " ".join(printed.getvalue().split())
print(said)
"""


def needs_what_is_gone(folder: Path) -> Path:
    """A native module whose loader does not find a library that it was linked with."""
    for name, code in (
        ("libgone", "int gone(void) { return 0; }"),
        ("_C", "int gone(void); void *PyInit__C(void) { gone(); return 0; }"),
    ):
        (folder / f"{name}.c").write_text(code)
        command = ["cc", "-shared", "-fPIC", f"{name}.c", "-o", f"{name}.so", "-L."]
        command += [] if name == "libgone" else ["-lgone"]
        subprocess.run(command, cwd=folder, check=True)
    (folder / "libgone.so").unlink()
    return folder / "_C.so"


@pytest.mark.parametrize(
    ("preamble", "reason"),
    [
        (HALTED, "import of cfpo_kernels._C halted"),
        (BROKEN, "libgone.so: cannot open shared object file"),
    ],
    ids=["refused", "linked"],
)
def test_a_library_that_is_missing_is_named_by_everyone_once(
    preamble: str, reason: str, tmp_path: Path
) -> None:
    module = ""
    if preamble == BROKEN:
        if shutil.which("cc") is None or sys.platform != "linux":
            pytest.skip("needs a C compiler, and the loader of Linux")
        module = str(needs_what_is_gone(tmp_path))
    imports = "import contextlib, importlib.util, io, sys, warnings"
    found = subprocess.run(
        [sys.executable, "-c", "\n".join((imports, preamble, MISSING)), module],
        capture_output=True, text=True, timeout=HANGS_AFTER,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    said = ast.literal_eval(found.stdout)
    why = f"the native module could not be imported: {reason}"
    pure = "the package in pure Python" in said["available_backends"]
    assert pure == (preamble == HALTED), "it is there, and cannot be loaded"
    for who in ("{}", "{'inplace': True}"):
        assert len(said[who]) == 1 and why in said[who][0], said
    assert said["{'backend': 'cpu'}"] == []
    for who in ("available_backends", "cpu", "info"):
        assert why in said[who], said


def test_triton_that_cannot_be_imported_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.6.0"))
    monkeypatch.setattr(triton, "_INSTALLED", True)
    monkeypatch.setattr(triton, "has_device", lambda kind: kind == "cuda")
    monkeypatch.setattr(triton, "_module", fail)
    triton._import_failure.cache_clear()
    try:
        assert "libcuda.so.1" in cfpo_kernels.available_backends()["triton"].detail
        with pytest.raises(cfpo_kernels.BackendUnavailableError, match=r"libcuda\.so\.1"):
            backends.resolve("triton", torch.device("cuda", 0), BF16, 1000)
    finally:
        triton._import_failure.cache_clear()


def test_triton_that_is_too_old_says_so(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.4.0+git1"))
    monkeypatch.setattr(triton, "_INSTALLED", True)
    monkeypatch.setattr(triton, "has_device", lambda kind: kind == "cuda")
    monkeypatch.setattr(targets, "why_not", WHY_NOT)
    why = "the kernels need Triton 3.6 or newer, installed is 3.4.0"
    triton._import_failure.cache_clear()
    try:
        status = cfpo_kernels.available_backends()["triton"]
        assert not status and why in status.detail
        with pytest.raises(cfpo_kernels.BackendUnavailableError, match=why):
            backends.resolve("triton", torch.device("cuda", 0), BF16, 1000)
        with pytest.warns(UserWarning, match=f"no kernels can run on it .*triton: {why}"):
            assert backends.resolve("auto", gpu, BF16, 1000) == "reference"
    finally:
        triton._import_failure.cache_clear()


# The processor's own kernels --------------------------------------------------------------------


def test_the_cpu_needs_no_record(battery: list[str]) -> None:
    assert backends.resolve("auto", CPU, BF16, 1000) == "cpu"
    assert not battery


@pytest.mark.parametrize("verdict", ["wrong", "crashed"])
def test_a_record_condemns_the_cpu_for_its_dtype(verdict: str) -> None:
    identity = records.identity_of(CPU)
    records.store(VerifyRecord(identity, verdicts=[Verdict("cpu", "bfloat16", verdict, "a case")]))
    with pytest.warns(UserWarning, match=rf"cpu is {verdict} \(a case\)"):
        assert backends.resolve("auto", CPU, BF16, 1000) == "reference"
    assert backends.resolve("auto", CPU, F32, 1000) == "cpu"


# Processes of other kinds -----------------------------------------------------------------------

FORKED = """
import torch, cfpo_kernels
from torch.utils.data import DataLoader

class Losses(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, i):
        x = torch.randn(2, 50)
        return cfpo_kernels.cfpo_loss(x, torch.tensor([1, 2]), torch.ones(2))

print([len(batch) for batch in DataLoader(Losses(), batch_size=2, num_workers=2)])
"""
WITHOUT_MAIN = """
import sys
del sys.modules["__main__"].__file__  # "<stdin>", as good as none
import cfpo_kernels
from cfpo_kernels.verification import run
run.PROVIDER = "simulated:small_cpu"
record = cfpo_kernels.verify(device="cpu", timeout=900)
print([verdict.verdict for verdict in record.verdicts])
"""


@pytest.mark.parametrize(
    ("program", "said"),
    [(FORKED, "[2, 2]"), (WITHOUT_MAIN, "['right', 'right', 'right']")],
    ids=["forked worker", "notebook"],
)
def test_processes_of_other_kinds(program: str, said: str, tmp_path: Path) -> None:
    environment = os.environ | {
        "CFPO_KERNELS_CACHE": str(tmp_path),
        "PYTHONPATH": str(SUPPORT),
    }
    done = subprocess.run(
        [sys.executable, "-"], input=program, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == said
