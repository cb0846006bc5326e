"""What ``python -m cfpo_kernels memory`` prints: formulas that test_linear_memory.py measures."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from limits import HANGS_AFTER

from cfpo_kernels.__main__ import main

SIZES = ["memory", "--tokens", "1000", "--vocab", "50000", "--hidden", "64"]


def bytes_of(capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, int]:
    assert main([*SIZES, "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)["bytes"]  # type: ignore[no-any-return]


def test_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    on = ("--device", "cuda", "--chunk-tokens", "200", "--dtype")
    found = list(bytes_of(capsys, *on, "fp32").values())
    logits, x, head = 1000 * 50000 * 4, 1000 * 64 * 4, 50000 * 64 * 4
    tile, operands = 200 * 50000 * 4, 200 * 64 * 4
    assert found == [
        4 * logits,
        2 * logits + x + head,
        logits + x + head,
        tile + operands + x + head,
        tile + 200 * 8192 * 4 + 3 * x + head + 8192 * 64 * 4 + operands,
        tile + operands + x,
        tile + operands,
    ]
    halved = list(bytes_of(capsys, *on, "bf16").values())
    assert halved[0] == 3 * logits + logits // 2
    assert halved[3] == x // 2 + head + max(tile // 2 + operands // 2, head // 2)
    split = list(bytes_of(capsys, *on, "fp32", "--tp", "4").values())
    assert split[2] == (logits + head) // 4 + x
    assert split[3] == 2 * tile // 4 + operands + x + head // 4  # two tiles


def test_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SIZES, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "tiles of 128 rows on cpu" in printed
    assert len([line for line in printed.splitlines() if "linear_" in line]) == 4


@pytest.mark.parametrize(
    "wrong", [["--tokens", "0"], ["--vocab", "x"], ["--dtype", "int8"], ["--tp", "60000"]]
)
def test_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main([*SIZES, *wrong])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2 and wrong[0] in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [SIZES, ["info"]], ids=lambda x: x[0])
def test_whoever_stops_reading_gets_no_traceback(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "cfpo_kernels", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    _, said = process.communicate(timeout=HANGS_AFTER)
    assert (said, process.returncode) == ("", 141)
