"""What is kept of a verification: whole or not at all, and only for what it was found on."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import verified_table
from marked import with_part

from cfpo_kernels.verification import cases, choice, records, run
from cfpo_kernels.verification.records import Identity, Timing, Verdict, VerifyRecord

IDENTITY = Identity("0.1", "abc", "A GPU (SXM)", "9.0", "13000", "2.13.0", "3.7.1")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("CFPO_KERNELS_CACHE", str(folder))
    return folder


def make_record(*verdicts: str, identity: Identity = IDENTITY) -> VerifyRecord:
    names = ("cuda", "cuda-portable", "triton")
    found = [Verdict(n, "bfloat16", v) for n, v in zip(names, verdicts, strict=False)]
    timings = [Timing(v.kernels, v.dtype, 8, 32000, 2.0, 1.5) for v in found]
    return VerifyRecord(identity, False, found, timings, "2026-01-01T00:00:00+00:00", 1.0)


def test_what_was_written_is_read() -> None:
    record = make_record("right", "wrong", "crashed")
    path = records.store(record)
    assert records.load(IDENTITY) == record == records.read(path)
    assert path.name.startswith("a-gpu-sxm-") and not list(path.parent.glob("*.tmp"))


def test_only_what_says_something_of_the_kernels_is_kept() -> None:
    records.store(make_record("right", "not run"))
    known = records.load(IDENTITY)
    assert known is not None
    assert [v.kernels for v in known.verdicts] == [t.kernels for t in known.timings] == ["cuda"]


def test_a_later_record_adds_to_an_older_one() -> None:
    records.store(make_record("right", "right"))
    later = make_record("wrong")
    later.verdicts += [Verdict("triton", "bfloat16", "right")]
    records.store(later)
    known = records.load(IDENTITY)
    assert known is not None
    assert {v.kernels: v.verdict for v in known.verdicts} == {
        "cuda": "wrong",
        "cuda-portable": "right",
        "triton": "right",
    }


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Identity)])
def test_a_record_of_another_build_or_device_is_not_used(name: str) -> None:
    path = records.store(make_record("right"))
    other = dataclasses.replace(IDENTITY, **{name: "another"})
    assert records.load(other) is None
    # Not even where its file has the right name.
    path.rename(records.path_of(other))
    assert records.load(other) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        '{"format": 1}',
        '{"format": 99}',
        "\x00\x01",
        '{"format": 1, "id": 3}',
    ],
)
def test_a_broken_record_is_ignored(text: str) -> None:
    path = records.path_of(IDENTITY)
    path.parent.mkdir()
    path.write_text(text)
    assert records.load(IDENTITY) is None
    records.store(make_record("right"))
    assert records.load(IDENTITY) == make_record("right")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_torn_record_is_ignored(share: float) -> None:
    path = records.store(make_record("right", "right", "wrong"))
    text = path.read_text()
    path.write_text(text[: int(share * len(text))])
    assert records.load(IDENTITY) is None


def test_unknown_verdicts_and_fields_are_no_record() -> None:
    values = make_record("right").as_json()
    for damage in (
        {"verdicts": [{"kernels": "cuda", "dtype": "bfloat16", "verdict": "splendid"}]},
        {"verdicts": [{"kernels": "cuda"}]},
        {"identity": {**values["identity"], "driver": 13}},
        {"timings": [{"kernels": "cuda", "fast": True}]},
    ):
        with pytest.raises(ValueError, match="no record"):
            VerifyRecord.from_json(json.loads(json.dumps({**values, **damage})))


def test_records_that_ship_with_the_package(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(records, "SHIPPED", tmp_path / "shipped")
    (tmp_path / "shipped").mkdir()
    shipped = make_record("right")
    (tmp_path / "shipped" / "a-gpu.json").write_text(json.dumps(shipped.as_json()))
    # Neither torch nor the driver makes these kernels.
    here = dataclasses.replace(IDENTITY, torch="2.14.0", driver="13010")
    assert records.load(here) == shipped
    assert records.load(dataclasses.replace(here, triton="3.8.0")) is None
    assert records.load(dataclasses.replace(here, code="another")) is None
    own = make_record("wrong", identity=here)
    records.store(own)
    assert records.load(here) == own, "what was found on this machine comes first"


def test_shipped_records_are_whole() -> None:
    paths = sorted(records.SHIPPED.glob("*.json"))
    assert len(records.shipped()) == len(paths)


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert records.cache_folder() == Path(os.environ["CFPO_KERNELS_CACHE"])
    monkeypatch.delenv("CFPO_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert records.cache_folder() == Path("/somewhere/cfpo_kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert records.cache_folder() == Path("/home/somebody/.cache/cfpo_kernels")


@pytest.mark.parametrize(("verdicts", "status"), [
    ([], 0), (["right"], 0), (["right", "wrong"], 1), (["crashed"], 1), (["right", "not run"], 2),
    (["wrong", "not run"], 1),
])  # fmt: skip
def test_exit_status(verdicts: list[str], status: int) -> None:
    assert make_record(*verdicts).exit_status() == status


def test_the_code_hash_sees_every_kernel_and_check(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {path.name for path in records._sources()}
    assert {"kernels.py", "softmax.py", "native.py", "battery.py", "compare.py"} <= names
    before = records.code_hash()
    read = Path.read_bytes
    records.code_hash.cache_clear()
    monkeypatch.setattr(
        Path, "read_bytes", lambda p: read(p) + (b"#" if p.name == "softmax.py" else b"")
    )
    assert records.code_hash() != before
    monkeypatch.undo()
    records.code_hash.cache_clear()


# Where nothing can be written -------------------------------------------------------------------


@pytest.mark.parametrize("why", ["a file in its place", "full"])
def test_a_record_that_cannot_be_kept_is_used_all_the_same(
    why: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "full":

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
    else:
        cache.write_text("")
    found = run.process.Found(IDENTITY, [Verdict("cpu", "float32", "right")])
    monkeypatch.setattr(run.process, "check", lambda *_: found)
    monkeypatch.setattr(records, "identity_of", lambda _: IDENTITY)
    said: list[str] = []
    with records.lock(IDENTITY):  # nobody waits where no lock can be had
        record = run.check(torch.device("cpu"), notice=said.append)
    assert record.verdict("cpu", "float32") == "right"
    assert "could not be written, and is known to this process only" in said[0]
    assert not cache.is_dir() or not [*cache.glob("*.json"), *cache.glob("*.tmp")]


# Eight ranks ------------------------------------------------------------------------------------


def _a_rank(folder: str, barrier: Any, queue: Any) -> None:
    os.environ["CFPO_KERNELS_CACHE"] = folder

    def check(device: torch.device, **_: Any) -> VerifyRecord:
        queue.put("checked")
        time.sleep(0.3)
        record = make_record("right")
        records.store(record)
        return record

    run.check = check  # type: ignore[assignment]
    barrier.wait()
    record = choice._verify_once(torch.device("cpu"), IDENTITY, "once")
    queue.put(record.verdict("cuda", "bfloat16"))


def test_of_eight_ranks_one_verifies(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(8), context.Queue()
    ranks = [
        context.Process(target=_a_rank, args=(str(tmp_path), barrier, queue)) for _ in range(8)
    ]
    for rank in ranks:
        rank.start()
    said = [queue.get(timeout=900) for _ in range(9)]
    for rank in ranks:
        rank.join(900)
    assert sorted(said) == ["checked"] + ["right"] * 8


# The README's table -----------------------------------------------------------------------------


def table_row(backend: str, found: list[VerifyRecord], before: list[VerifyRecord]) -> str:
    rows = verified_table.table(found, before).splitlines()
    return next(row for row in rows if row.startswith(f"| `{backend}`"))


def test_the_table_in_the_readme_is_made_from_the_records() -> None:
    text = verified_table.README.read_text()
    made = verified_table.table(records.shipped(), verified_table.earlier())
    assert with_part(text, "verified", made) == text, "run tools/verified_table.py --write"


def test_the_readme_says_how_many_cases_there_are() -> None:
    assert f"a battery of {len(cases.short())} cases" in verified_table.README.read_text()


def test_what_the_table_says_of_a_device() -> None:
    record = make_record("right", "wrong", "wrong")
    name = "A GPU (SXM) (bfloat16)"
    assert f"| verified on {name}; tested" in table_row("cuda", [record], [])
    once = table_row("cuda", [], [record])
    assert f"| right on {name} in an earlier version; tested" in once and "verified on" not in once
    assert f"| verified on {name}; tested" in table_row("cuda", [record], [record])
    assert verified_table.NOT_YET in table_row("cuda", [], [])
    seen = table_row("triton", [record], [record])
    assert "in the short battery on an H200, in an earlier version" in seen
    assert "verified on" not in seen


def test_what_was_seen_of_earlier_versions_is_read() -> None:
    paths = list(verified_table.RESULTS.glob("*-verify.json"))
    assert len(verified_table.earlier()) == len(paths) > 0
    assert "right on NVIDIA H200" in table_row("cuda", [], verified_table.earlier())


def test_the_identity_of_an_nvidia_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.11 describes an H200: AMD's attribute is there, and has the name in it."""
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, gcnArchName="NVIDIA H200")
    module = SimpleNamespace(get_device_properties=lambda device: properties)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    library = SimpleNamespace(cuDriverGetVersion=lambda found: setattr(found._obj, "value", 13000))
    monkeypatch.setattr(records.ctypes, "CDLL", lambda name: library)
    identity = records.identity_of(torch.device("cuda"))
    assert (identity.device, identity.capability, identity.driver) == (
        "NVIDIA H200",
        "9.0",
        "13000",
    )


def why_not_shipped(record: VerifyRecord) -> list[str]:
    """What keeps a record from ever speaking of this version's kernels."""
    identity, version = record.identity, records.version_of("cfpo-kernels")
    found = [] if record.verdicts else ["says nothing"]
    if identity.package != version:
        found.append(f"is of version {identity.package}, not {version}")
    if not re.fullmatch(r"\d+\.\d+", identity.capability):
        found.append(f"has the compute capability {identity.capability!r}")
    return found


def test_shipped_records_are_of_this_version() -> None:
    shipped = records.shipped()
    assert [why_not_shipped(record) for record in shipped] == [[] for _ in shipped]


def test_a_record_of_another_version_cannot_ship() -> None:
    here = dataclasses.replace(IDENTITY, package=records.version_of("cfpo-kernels"))
    assert why_not_shipped(make_record("right", identity=here)) == []
    (h200,) = verified_table.earlier()
    assert why_not_shipped(h200) == [
        f"is of version none, not {here.package}",
        "has the compute capability 'NVIDIA H200'",
    ]
    assert why_not_shipped(make_record(identity=here)) == ["says nothing"]
