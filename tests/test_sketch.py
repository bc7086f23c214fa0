"""Sketches of torch tensors: equal exactly when views say the same but the address, and none where there is no view."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cupy_mla.arrays.sketch import Sketches, pointer_of
from cupy_mla.arrays.view import view

torch = pytest.importorskip("torch", reason="torch is not installed")


sketches: dict[int, Sketches] = {}  # of functions of one array, of two, and so on
sketch_pairs = Sketches(pairs=1).sketch


def sketch(arrays: tuple[Any, ...], others: tuple[Any, ...] = ()) -> Any:
    return sketches.setdefault(len(arrays), Sketches()).sketch(arrays, others)


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
            found = [sketch((tensor,)) for tensor in (first, second)]
            assert found[0] is not None
            assert found[1] is not None
            same_type = type(first) is type(second)
            assert (found[0][2] == found[1][2]) == (described[0] == described[1])
            assert (found[0][1] is found[1][1]) == same_type
            assert found[0][0] == (first.data_ptr(),) == (pointer_of(first),)


def test_views_are_sketched_as_well() -> None:
    views = [_view(tensor) for tensor in tensors().values()]
    views.append(replace(views[0], device="cuda"))
    for first in views:
        for second in views:
            described = [(v.shape, v.strides, v.dtype, v.location) for v in (first, second)]
            (pointers, _, form), (_, _, other) = (sketch((array,)) for array in (first, second))
            assert pointers == (first.pointer,)
            assert (form == other) == (described[0] == described[1])


def _view(tensor: Any) -> Any:
    return view(tensor, "tensor")


def test_many_tensors_have_the_sketches_of_each() -> None:
    many = tuple(tensors().values())
    together = sketch(many)
    assert together is not None
    alone = [sketch((tensor,)) for tensor in many]
    assert together[0] == tuple(pointer for found in alone for pointer in found[0])
    assert together[2] == tuple(word for found in alone for word in found[2])


def test_pairs_have_two_addresses_each() -> None:
    first, second, third = [*tensors().values()][:3]
    packed, pair = sketch_pairs((first, third)), sketch_pairs(((first, second), third))
    assert packed is not None
    assert pair is not None
    assert packed[0] == (first.data_ptr(), 0, third.data_ptr())
    assert pair[0] == (first.data_ptr(), second.data_ptr(), third.data_ptr())
    assert pair[1] is sketch_pairs(((second, first), third))[1] is not packed[1]
    assert sketch_pairs(((first, torch.nn.Parameter(second)), third))[1] is not pair[1]
    for wrong in ((), (first,), (first, second, third), [first, second], (first, 3), (first, torch.zeros(0))):
        assert sketch_pairs((wrong, third)) is None
    assert sketch_pairs((third, (first, second))) is None


def test_three_arrays_are_no_pair_even_after_one() -> None:
    sketched, array = Sketches(pairs=1).sketch, torch.zeros(3)
    assert sketched(((array, array), array)) is not None
    assert sketched(((array, array, array), array)) is None
    assert sketched(((array,), array)) is None


def test_arrays_after_pairs_are_sketched() -> None:
    """Also such as have no two parts."""
    sketched = Sketches(pairs=1).sketch
    whole, half = torch.zeros(1, 8), torch.zeros(1, 4)
    for first, addresses in (((half, half), [half.data_ptr()] * 2), (whole, [whole.data_ptr(), 0])):
        found = sketched((first, half))
        assert found is not None
        assert found[0] == (*addresses, half.data_ptr())


def test_types_of_other_values_count() -> None:
    tensor = torch.zeros(3)
    values = (1, 1.0, True, None, "1")
    assert len({sketch((tensor,), (value,))[1] for value in values}) == len(values)


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
    good = tuple(tensors().values())[:5]
    assert sketch((*good, make())) is None
    assert sketch((make(), *good)) is None


def test_arrays_that_are_not_there() -> None:
    tensor = torch.zeros(3)
    pointers, _, layouts = sketch((None, tensor, None))
    assert pointers == (0, tensor.data_ptr(), 0)
    assert layouts == (None, (3,), True, tensor.dtype, -1, None)
