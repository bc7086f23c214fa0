"""scripts/fp8_errors.py without a GPU: its data, its comparison with float64 and its emulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
MAX_ERROR = 3e-3
MAX_LSE_ERROR = {"exact": 2e-4, "split": 5e-2}
LENGTH = 512


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import fp8_errors

    return fp8_errors


def test_kinds_of_data_differ_as_they_say(script: Any) -> None:
    made = {kind: script.make_data(kind, LENGTH, "cpu") for kind in script.KINDS}
    columns = torch.arange(script.WIDTH)[script.OUTLIER_COLUMNS]
    for kind, data in made.items():
        values, q = data.stored * script.KV_SCALE, data.q.float()
        assert abs(float(values.mean()) - (kind == "mean")) < 0.05
        assert (float(values[:, columns].std()) > 15) == (kind in ("outliers in K", "outliers in both"))
        assert (float(q[..., columns].std()) > 15) == (kind in ("outliers in q", "outliers in both"))
        assert (float(q.abs().median()) > 2) == (kind == "peaked")


@pytest.mark.parametrize("compute", ["exact", "split"])
def test_the_emulation_is_within_the_contract(script: Any, compute: str) -> None:
    for kind in script.KINDS:
        errors = script.emulated(script.make_data(kind, LENGTH, "cpu"), compute)
        assert 0 < errors.out < MAX_ERROR, kind
        assert 0 < errors.lse < MAX_LSE_ERROR[compute], kind


def test_the_emulation_loses_what_tensor_cores_lose(script: Any) -> None:
    a, stored = torch.zeros(1, script.WIDTH), torch.zeros(2, script.WIDTH)
    a[0, :2], stored[:, 0] = 1.0, 256.0
    stored[0, 1], stored[1, 1] = 2.0**-5, 2.0**-6  # 13 bits below the largest, and 14
    assert script.multiply_e4m3(a, stored).tolist() == [[256.0 + 2.0**-5, 256.0]]
    later = torch.roll(a, script.STEP_COLUMNS * script.PROMOTED_STEPS - 1, 1)
    later[0, 0] = 1.0
    moved = torch.roll(stored[:, 1:], script.STEP_COLUMNS * script.PROMOTED_STEPS - 1, 1)
    kept = script.multiply_e4m3(later, torch.cat([stored[:, :1], moved], 1))
    assert kept.tolist() == [[256.0 + 2.0**-5, 256.0 + 2.0**-6]]  # in another group, whose sum is a float32 one


def test_results_are_compared_with_float64(script: Any) -> None:
    data = script.make_data("mean", LENGTH, "cpu")
    errors = script.ours(data, "exact")
    assert 0 < errors.out < MAX_ERROR
    assert 0 < errors.lse < 1e-5
    out, lse = script.mla_decode(*data.arguments, kv_scale=1.1 * script.KV_SCALE)
    wrong = data.compare(out, lse)
    assert wrong.out > 10 * MAX_ERROR
    assert wrong.lse > 0.01
