"""Sketches of torch tensors: equal exactly when views say the same but the address, and none where there is no view."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from cupy_mla.arrays import sketch as sketch_module
from cupy_mla.arrays.sketch import Sketches, pointer_of
from cupy_mla.arrays.view import view

torch = pytest.importorskip("torch", reason="torch is not installed")


REPEATS = 7  # enough for a call to be one that is made again and again
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


@pytest.mark.parametrize("name", tensors())
def test_repeated_calls_are_recognised_and_others_are_not(name: str) -> None:
    repeated, named = Sketches().sketch, tensors()
    again = tensors()[name]  # other memory, the same form
    for _ in range(REPEATS):
        sketched = repeated((named[name], again))
    assert repeated((again, named[name]))[2] is sketched[2]  # what was noted, without asking for forms
    assert repeated((again, named[name]))[0] == (again.data_ptr(), named[name].data_ptr())
    negative = torch.complex(torch.zeros(4, 6, 8), torch.zeros(4, 6, 8)).conj().imag
    for other in (*named.values(), negative, named[name].detach().requires_grad_(named[name].is_floating_point())):
        found, plain = repeated((again, other)), sketch((again, other))
        assert found[0] == plain[0]
        assert found[2] == plain[2]
        for _ in range(REPEATS):  # recognised again, once it is repeated again
            sketched = repeated((again, named[name]))
        assert repeated((again, named[name]))[2] is sketched[2]


def test_a_repeated_call_that_gives_an_array_twice_is_sketched() -> None:
    repeated = Sketches().sketch
    first, second = torch.zeros(3, 4), torch.zeros(3, 4)
    for _ in range(REPEATS):
        sketched = repeated((first, second))
    assert repeated((first, first))[::2] == ((first.data_ptr(),) * 2, sketched[2])


def test_repeated_calls_are_recognised_in_inference_mode() -> None:
    repeated = Sketches().sketch
    with torch.inference_mode():
        tensor = torch.zeros(3, 4)
        for _ in range(REPEATS):
            sketched = repeated((tensor,))
        assert repeated((torch.zeros(3, 4),))[2] is sketched[2]
        assert repeated((torch.zeros(4, 3),))[2] != sketched[2]


def test_numbers_in_the_places_of_arrays_count_in_repeated_calls() -> None:
    repeated, tensor = Sketches().sketch, torch.zeros(3)
    for _ in range(REPEATS):
        sketched = repeated((tensor, 0.5))
    assert repeated((tensor, 0.5))[2] is sketched[2]
    assert repeated((tensor, 0.25))[2][-1] == 0.25


def test_two_numbers_in_the_place_of_an_array_count_too() -> None:
    repeated, tensor = Sketches().sketch, torch.zeros(3)
    for _ in range(REPEATS):
        sketched = repeated((tensor, (0.5, 0.25)))
    assert sketched[0] == (tensor.data_ptr(), 0)
    assert repeated((tensor, (0.5, 0.25)))[2] is sketched[2]
    assert repeated((tensor, (0.5, 0.125)))[2][-1] == (0.5, 0.125)
    for other in ((0.5, 1), (0.5,), [0.5, 0.25], (tensor, 0.5)):
        assert repeated((tensor, other)) is None
    assert repeated((tensor, (0.5, 0.25, 1.0)))[2] != sketched[2]


def test_a_torch_without_guards_has_sketches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch._C._dynamo.guards", None)
    monkeypatch.setattr(sketch_module, "_tensor_guards", sketch_module._tensor_guards.__wrapped__)
    repeated, tensor = Sketches().sketch, torch.zeros(3)
    sketched = [repeated((tensor,)) for _ in range(REPEATS + 1)]
    assert all(found == sketched[0] for found in sketched)
    assert sketched[-1][2] is not sketched[-2][2]


def test_a_repeated_call_without_memory_has_no_sketch() -> None:
    repeated, tensor = Sketches().sketch, torch.zeros(3, 4)
    for _ in range(REPEATS):
        repeated((tensor,))
    tensor.untyped_storage().resize_(0)
    assert repeated((tensor,)) is None


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


def test_arrays_after_pairs_are_sketched() -> None:
    """Also such as have no two parts."""
    sketched = Sketches(pairs=1).sketch
    whole, half = torch.zeros(1, 8), torch.zeros(1, 4)
    for first, addresses in (((half, half), [half.data_ptr()] * 2), (whole, [whole.data_ptr(), 0])):
        for _ in range(REPEATS):
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
