"""Sketches of torch tensors: equal exactly when views say the same but the address, and none where there is no view."""

from __future__ import annotations

from typing import Any

import pytest

from cupy_mla.arrays.sketch import pointer_of, sketch, sketch_tensors
from cupy_mla.arrays.view import view

torch = pytest.importorskip("torch", reason="torch is not installed")


def tensors() -> dict[str, Any]:
    base = torch.zeros(4, 6, 8)
    return {
        "plain": base,
        "another": torch.zeros(4, 6, 8),
        "half": torch.zeros(4, 6, 8, dtype=torch.float16),
        "bfloat16": torch.zeros(4, 6, 8, dtype=torch.bfloat16),
        "other shape": torch.zeros(4, 8, 6),
        "transposed": torch.zeros(4, 8, 6).transpose(1, 2),
        "columns": torch.zeros(4, 6, 16)[..., :8],
        "every second row": torch.zeros(4, 12, 8)[:, ::2],
        "repeated": torch.zeros(1, 6, 8).expand(4, 6, 8),
        "parameter": torch.nn.Parameter(torch.zeros(4, 6, 8)),
    }


@pytest.fixture(autouse=True)
def _seen() -> None:
    view(torch.zeros(1), "seen")
    view(torch.nn.Parameter(torch.zeros(1)), "seen")


def test_layouts_are_equal_when_views_are() -> None:
    named = tensors()
    for first in named.values():
        for second in named.values():
            described = [(v.shape, v.strides, v.dtype, v.device, v.device_id) for v in map(_view, (first, second))]
            sketches = [sketch([tensor]) for tensor in (first, second)]
            assert sketches[0] is not None
            assert sketches[1] is not None
            assert (sketches[0][1] == sketches[1][1]) == (described[0] == described[1])
            assert sketches[0][0] == [first.data_ptr()] == [pointer_of(first)]


def _view(tensor: Any) -> Any:
    return view(tensor, "tensor")


def test_six_tensors_have_the_same_sketch_either_way() -> None:
    six = [*tensors().values()][:6]
    general, written_out = sketch(six), sketch_tensors(*six)
    assert general is not None
    assert written_out is not None
    assert (tuple(general[0]), tuple(general[1])) == written_out


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(4, 6, 8, device="meta"),
        lambda: torch.zeros(4, 4).to_sparse(),
        lambda: torch.zeros(0, 4),
        lambda: [1, 2],
    ],
)
def test_what_has_no_memory_has_no_sketch(make: Any) -> None:
    good = [*tensors().values()][:5]
    assert sketch([*good, make()]) is None
    assert sketch_tensors(*good, make()) is None
    assert sketch_tensors(make(), *good) is None


def test_arrays_that_are_not_there() -> None:
    tensor = torch.zeros(3)
    assert sketch([None, tensor, None]) == (
        [0, tensor.data_ptr(), 0],
        [None, (3,), True, tensor.dtype, tensor.device, None],
    )
