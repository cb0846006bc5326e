"""The benchmark itself: it runs, it refuses wrong kernels, and its memory figures can fail."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from repository import ROOT

pytest.importorskip("matplotlib")

if str(ROOT) not in sys.path:  # bench is run from the repository, not installed
    sys.path.insert(0, str(ROOT))

from bench import __main__ as command_line
from bench import checks, implementations, memory, naive, peers, report
from bench.cases import Case, find_cases, quick_case
from bench.harness import EXACT, LOW_PRECISION, PEER, Implementation, step
from bench.problem import Problem, make_problem
from bench.runner import Settings, run_case
from bench.timing import interleaved_samples

SMALL = quick_case(1003, "bf16")


def implementation(function, name="injected", kind="ours", tolerance=EXACT, **options):
    return Implementation(name, name, kind, lambda: function, tolerance, **options)


class _WithGradient(torch.autograd.Function):
    """The exact loss and dlogits, then spoilt by `spoil(loss, dlogits, problem)`."""

    @staticmethod
    def forward(ctx, logits, problem, spoil):
        with torch.enable_grad():
            exact = logits.detach().double().requires_grad_()
            logps = naive.selected_logps(exact, problem.token_ids)
            loss = naive.objective_term(logps, problem.old_logps, problem.advantages).mean()
        (dlogits,) = torch.autograd.grad(loss, exact, loss.new_tensor(problem.case.loss_scale))
        loss, ctx.dlogits = spoil(loss.detach().float(), dlogits.to(logits.dtype), problem)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        return ctx.dlogits, None, None


def spoilt(spoil):
    return lambda logits, problem: _WithGradient.apply(logits, problem, spoil)


def keep(loss, dlogits, problem):
    return loss, dlogits


def wrong_loss(loss, dlogits, problem):
    return loss * 1.01, dlogits


def wrong_target(loss, dlogits, problem):
    targets = problem.token_ids[:, None]
    return loss, dlogits.scatter(1, targets, dlogits.gather(1, targets) * 1.2)


def zeros_off_target(loss, dlogits, problem):
    targets = problem.token_ids[:, None]
    return loss, torch.zeros_like(dlogits).scatter(1, targets, dlogits.gather(1, targets))


def nan_in_last_row(loss, dlogits, problem):
    dlogits[-1, 0] = float("nan")
    return loss, dlogits


def check(function, tolerance=EXACT, case: Case = SMALL):
    problem = make_problem(case)
    entry = implementation(function, tolerance=tolerance)
    loss, dlogits = step(entry, function, problem.logits.clone(), problem)
    return checks.check(entry, loss, dlogits, checks.exact_results(problem, "cfpo"))


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """The command line as a user calls it, once for all tests of its output.

    Without torch.compile, which takes its time.
    """
    folder = tmp_path_factory.mktemp("bench")
    names = "cpu-inplace,cpu-outofplace,cpu-token-logps,cpu-forward,eager-f32"
    chosen = [name for name in names.split(",") if name in available_names()]
    command = [sys.executable, "-m", "bench", "--cases", "quick", "--rounds", "3"]
    files = ["--json", folder / "out.json", "--plot", folder / "out.png"]
    done = subprocess.run(
        [*command, "--implementations", ",".join(chosen), *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # Where no terminal is, lines say how far it is.
    steps = [line.split()[0] for line in done.stderr.splitlines()]
    assert len(steps) > 3 and steps == [f"{i + 1}/{len(steps)}" for i in range(len(steps))]
    return done.stdout, json.loads((folder / "out.json").read_text()), folder, chosen


def available_names():
    return [entry.name for entry in implementations.implementations_for("cpu")]


def test_quick_run_reports_every_implementation(quick_run):
    output, saved, folder, chosen = quick_run
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")
    assert [case["name"] for case in saved["cases"]] == [case.name for case in find_cases("quick")]
    for case in saved["cases"]:
        shown = [result["name"] for result in case["results"]] + list(case["skipped"])
        assert sorted(shown) == sorted(chosen)
        assert case["name"] in output


def test_json_says_what_was_measured_and_on_what(quick_run):
    _, saved, _, _ = quick_run
    assert saved["schema"] == report.SCHEMA
    assert {"cpu", "gpu", "memory_bytes"} <= saved["machine"].keys()
    assert {"model", "cores", "caches"} <= saved["machine"]["cpu"].keys()
    assert {"python", "torch", "cfpo-kernels", "git_commit"} <= saved["versions"].keys()
    assert saved["settings"]["threads"] >= 1
    assert saved["backends"]["reference"]["available"]
    assert saved["date"] and saved["notes"]


def test_json_figures_are_consistent(quick_run):
    _, saved, _, _ = quick_run
    for case in saved["cases"]:
        for result in case["results"]:
            assert 1 <= len(result["samples_ms"]) <= 3
            assert result["min_ms"] <= result["median_ms"] <= result["max_ms"]
            sweeps = 2 if result["backward"] else 1
            assert result["counted_bytes"] == sweeps * case["logits_bytes"]
            rate = result["counted_bytes"] / result["median_ms"] / 1e6
            assert result["gb_per_s"] == pytest.approx(rate)
            ratio = result["median_ms"] / case["copy"]["median_ms"]
            assert result["ratio_to_copy"] == pytest.approx(ratio)
            assert result["errors"]["loss"] <= result["errors"]["loss_limit"]


@pytest.mark.skipif(not memory.can_measure_cpu(), reason="this system hides the peak")
def test_memory_figures_tell_implementations_apart(quick_run):
    _, saved, _, _ = quick_run
    case = saved["cases"][0]
    extra = {result["name"]: result["extra_bytes"] for result in case["results"]}
    # float32 log-probs, their gradient, and dlogits: many times the logits.
    assert extra["eager-f32"] > 3 * case["logits_bytes"]
    if "cpu-inplace" in extra:
        assert extra["cpu-inplace"] < 1 << 20
        assert extra["cpu-forward"] < 1 << 20
        assert case["logits_bytes"] <= extra["cpu-outofplace"] < case["logits_bytes"] + (1 << 20)


def test_compiled_baseline_runs():
    (compiled,) = [e for e in implementations.baselines() if e.name == implementations.COMPILED]
    result = run_case(SMALL, [compiled], Settings(rounds=1, threads=1, memory=False))
    assert not result["skipped"]


def test_saved_report_can_be_shown_again(quick_run, tmp_path, capsys):
    _, _, folder, _ = quick_run
    picture = tmp_path / "again.png"
    arguments = ["--from-json", str(folder / "out.json"), "--plot", str(picture)]
    assert command_line.main(arguments) == 0
    assert picture.exists()
    assert "eager PyTorch, float32" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "f32"])
def test_check_passes_the_exact_result(dtype):
    check(spoilt(keep), case=quick_case(32000, dtype))


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "f32"])
def test_check_passes_everything_that_can_run_here(dtype):
    problem = make_problem(quick_case(1003, dtype))
    exact = checks.exact_results(problem, "cfpo")
    for entry in implementations.implementations_for("cpu"):
        if not entry.compiles:
            loss, dlogits = step(entry, entry.build(), problem.logits.clone(), problem)
            checks.check(entry, loss, dlogits, exact)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (wrong_loss, "loss error 0.0"),
        (wrong_target, "target column error 0.2"),
        (zeros_off_target, "off-target columns error 1,"),
        (nan_in_last_row, "off-target columns error nan"),
    ],
)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "f32"])
def test_check_refuses_wrong_results(spoil, complaint, dtype):
    with pytest.raises(checks.WrongResult, match=f"injected is wrong.*{complaint}"):
        check(spoilt(spoil), case=quick_case(1003, dtype))


def test_check_of_peers_refuses_what_is_plainly_wrong():
    check(naive.loss_float32, PEER)
    check(naive.loss_native, LOW_PRECISION)
    with pytest.raises(checks.WrongResult):
        check(spoilt(zeros_off_target), PEER)
    with pytest.raises(checks.WrongResult):
        check(lambda logits, problem: 2 * naive.loss_native(logits, problem), LOW_PRECISION)


def test_wrong_kernel_ends_the_program(monkeypatch, tmp_path, capsys):
    wrong = implementation(spoilt(zeros_off_target))
    monkeypatch.setattr(implementations, "implementations_for", lambda device: [wrong])
    saved = tmp_path / "out.json"
    status = command_line.main(["--cases", SMALL.name, "--no-memory", "--json", str(saved)])
    captured = capsys.readouterr()
    assert status == 1
    assert "injected is wrong: off-target columns error 1, allowed 0.00" in captured.err
    assert not captured.out
    assert not saved.exists()


def test_failing_kernel_is_no_mere_bad_argument(monkeypatch):
    def fail(logits, problem):
        raise ValueError("from inside")

    monkeypatch.setattr(implementations, "implementations_for", lambda _: [implementation(fail)])
    with pytest.raises(RuntimeError, match="injected failed on quick-1003-bf16"):
        command_line.main(["--cases", SMALL.name, "--no-memory"])


def test_wrong_peer_is_left_out_and_named():
    wrong = implementation(spoilt(zeros_off_target), "wrong", kind="peer", tolerance=PEER)
    right = implementation(naive.loss_float32, "right", kind="baseline", tolerance=PEER)
    result = run_case(SMALL, [wrong, right], Settings(rounds=1, threads=1, memory=False))
    assert [entry["name"] for entry in result["results"]] == ["right"]
    assert "off-target" in result["skipped"]["wrong"]


def test_peers_that_are_installed_are_compared(monkeypatch):
    """Stand-ins where the packages have their functions: what is called, and that it is right."""

    def logps(logits, token_ids):
        return naive.selected_logps(logits.float(), token_ids)

    def cross_entropy(logits, token_ids, reduction, inplace_backward):
        assert (reduction, inplace_backward) == ("none", True)
        return -logps(logits, token_ids)

    class FusedLogp:
        apply_fp32 = staticmethod(logps)

    modules = {
        "verl.utils.torch_functional": {"logprobs_from_logits_flash_attn": logps},
        "rl_engine.kernels.ops.cuda.loss.batch_invariant_logp": {
            "BatchInvariantLogpSM90Op": lambda: logps
        },
        "rl_engine.kernels.ops.cuda.loss.logp": {"FusedLogpGenericOp": FusedLogp},
        "quack.cross_entropy": {"cross_entropy": cross_entropy},
    }
    monkeypatch.setattr(peers, "find_spec", lambda name: name not in ("liger_kernel", "trl"))
    monkeypatch.setattr(peers, "import_module", lambda name: SimpleNamespace(**modules[name]))
    found = peers.implementations()
    result = run_case(SMALL, found, Settings(rounds=1, threads=1, memory=False))
    assert not result["skipped"] and not result["controls"]
    assert [entry["name"] for entry in result["results"]] == [
        "verl-logps", "rl-kernel-logps", "rl-kernel-forward", "quack-logps",
    ]  # fmt: skip


def test_a_control_is_shown_beside_the_copy(monkeypatch):
    monkeypatch.setattr(peers, "controls", lambda logits: {"a softmax": lambda: logits.softmax(-1)})
    right = implementation(naive.loss_float32, "right", kind="baseline", tolerance=PEER)
    result = run_case(SMALL, [right], Settings(rounds=2, threads=1, memory=False))
    (row,) = [row for row in report.table_rows(result) if row[0] == "a softmax"]
    median, copy = result["controls"]["a softmax"]["median_ms"], result["copy"]["median_ms"]
    assert row[4] == f"{median / copy:.2f}"


def test_clipped_objective_is_checked_as_liger_computes_it():
    def loss(logits: torch.Tensor, problem: Problem) -> torch.Tensor:
        logps = naive.selected_logps(logits.float(), problem.token_ids)[:-1]
        old_logps, advantages = problem.old_logps[:-1], problem.advantages[:1]
        return naive.objective_term(logps, old_logps, advantages, "ppo-clip").mean()

    entry = implementation(loss, kind="peer", tolerance=PEER, objective="ppo-clip")
    result = run_case(SMALL, [entry], Settings(rounds=1, threads=1, memory=False))
    assert not result["skipped"]


@pytest.mark.skipif(not memory.can_measure_cpu(), reason="this system hides the peak")
@pytest.mark.parametrize("mebibytes", [1, 4, 48])  # heap, heap or mapping, always a mapping
def test_memory_probe_sees_a_temporary(mebibytes):
    def allocate():
        torch.ones(mebibytes << 18)  # float32

    # More than once: a heap that kept the freed memory would hide the later ones. Code that is
    # loaded meanwhile may add to one of them.
    extras = [memory.cpu_extra_bytes(allocate) for _ in range(3)]
    assert min(extras) == pytest.approx(mebibytes << 20, abs=3 << 18), extras


@pytest.mark.skipif(not memory.can_measure_cpu(), reason="this system hides the peak")
def test_memory_probe_sees_nothing_where_there_is_nothing():
    values = torch.ones(1 << 22).add_(1)  # threads and code are there already
    assert memory.cpu_extra_bytes(lambda: values.add_(1)) < 3 << 18


def test_samples_are_interleaved_and_each_follows_a_restore():
    events: list[str] = []
    calls = {name: lambda name=name: events.append(name) for name in ("a", "b")}
    samples = interleaved_samples(calls, lambda: events.append("restore"), 3, "cpu")
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 3, "b": 3}
    assert events[::2] == ["restore"] * (len(events) // 2)
    assert events[1::2][-6:] == ["a", "b"] * 3


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--implementations", "nope"], "cannot run nope"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--json", "missing-folder/out.json"], "there is no folder"),
    ],
)
def test_bad_arguments_are_refused_before_measuring(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.main(["--cases", SMALL.name, *arguments])
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nope", "cpu-128256-int8", "cpu-1-bf16", ""])
def test_unknown_cases_are_refused(name):
    with pytest.raises(ValueError, match="unknown case"):
        find_cases(name)


def test_what_was_measured_is_kept_when_a_later_case_fails(tmp_path, monkeypatch):
    def run(case, *rest):
        if case.dtype_name == "f32":
            raise checks.WrongResult("injected is wrong")
        return run_case(case, *rest)

    monkeypatch.setattr(command_line, "run_case", run)
    saved = tmp_path / "out.json"
    arguments = ["--cases", "quick-1003-bf16,quick-1003-f32", "--without", "cpu,reference,compiled"]
    arguments += ["--rounds", "1", "--no-memory", "--json", str(saved)]
    assert command_line.main(arguments) == 1
    (case,) = json.loads(saved.read_text())["cases"]
    assert case["dtype"] == "bf16"
    assert {result["name"] for result in case["results"]} >= {"eager-f32", "eager-native"}
    assert not any(result["name"].startswith("cpu") for result in case["results"])
