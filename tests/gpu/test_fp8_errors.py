"""The table of errors of docs/fp8.md: dense decode over an e4m3 cache, on easy and on hard data, short and long."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import fp8_errors

pytestmark = pytest.mark.timeout(60)

MAX_ERROR = 3e-3
MAX_LSE_ERROR = {"exact": 2e-4, "split": 5e-2}
MAX_NORMAL_LSE_ERROR = {"exact": 2e-4, "split": 1e-3}


@pytest.mark.parametrize("length", fp8_errors.LENGTHS)
@pytest.mark.parametrize("kind", fp8_errors.KINDS)
@pytest.mark.parametrize("compute", fp8_errors.COMPUTES)
def test_errors_are_within_the_contract(compute: str, kind: str, length: int) -> None:
    errors = fp8_errors.ours(fp8_errors.make_data(kind, length), compute)
    assert errors.out < MAX_ERROR
    assert errors.lse < (MAX_NORMAL_LSE_ERROR if kind == "normal" else MAX_LSE_ERROR)[compute]


def test_a_wrong_scale_shows() -> None:
    data = fp8_errors.make_data("normal", 8192)
    out, lse = fp8_errors.mla_decode(*data.arguments, kv_scale=1.1 * fp8_errors.KV_SCALE)
    errors = data.compare(out, lse)
    assert errors.out > 10 * MAX_ERROR
    assert errors.lse > 10 * MAX_NORMAL_LSE_ERROR["split"]
