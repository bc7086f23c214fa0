"""Calls recognised by their arrays and options: those made again and again without asking for the forms of arrays."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import pytest

from cupy_mla.arrays import repeated
from cupy_mla.arrays.sketch import Sketches
from cupy_mla.arrays.view import view
from cupy_mla.call.known import KnownCalls
from cupy_mla.settings import get_settings

torch = pytest.importorskip("torch", reason="torch is not installed")

REPEATS = 8  # enough for a call to be one that is made again and again
NAMES = ("q", "q_rope", "cache_seqlens", "kv_scale")
SHAPE = (4, 6, 8)


def tensors() -> dict[str, Any]:
    return {
        "plain": torch.zeros(SHAPE),
        "another": torch.zeros(SHAPE),
        "half": torch.zeros(SHAPE, dtype=torch.float16),
        "bfloat16": torch.zeros(SHAPE, dtype=torch.bfloat16),
        "other shape": torch.zeros(4, 8, 6),
        "transposed": torch.zeros(4, 8, 6).transpose(1, 2),
        "columns": torch.zeros(4, 6, 16)[..., :8],
        "every second row": torch.zeros(4, 12, 8)[:, ::2],
        "repeated": torch.zeros(1, 6, 8).expand(SHAPE),
        "parameter": torch.nn.Parameter(torch.zeros(SHAPE)),
    }


class Calls:
    """Calls of a function of a few arrays; what is known of one is the key that it was first found by."""

    def __init__(self, num_arrays: int, pairs: int = 0) -> None:
        self.known: KnownCalls[Any] = KnownCalls(NAMES[: num_arrays + pairs], pairs)

    def find(self, *arrays: Any, options: tuple[Any, ...] = (512,), kind: Any = None, settings: Any = None) -> Any:
        settings = settings or get_settings()
        found = self.known.find(arrays, options, kind, settings)
        if found is not None and found[2] is None:
            self.known.remember(found[0], found[0], settings)
        return found

    def repeat(self, *arrays: Any, options: tuple[Any, ...] = (512,), kind: Any = None) -> Any:
        """Until the call is recognised without sketching it."""
        for _ in range(REPEATS):
            found = self.find(*arrays, options=options, kind=kind)
        assert self.is_recognised(*arrays, options=options, kind=kind)
        return found[2]

    def is_recognised(self, *arrays: Any, options: tuple[Any, ...] = (512,), kind: Any = None) -> bool:
        return self.known._recognise(arrays, options, kind, get_settings()) is not None


@pytest.fixture(autouse=True)
def _seen() -> None:
    view(torch.zeros(1), "seen")
    view(torch.nn.Parameter(torch.zeros(1)), "seen")


@pytest.mark.parametrize("name", tensors())
def test_repeated_calls_are_recognised_and_others_are_not(name: str) -> None:
    calls, named = Calls(2), tensors()
    again = tensors()[name]  # other memory, the same form
    known = calls.repeat(named[name], again)
    assert calls.is_recognised(again, named[name])
    assert calls.find(again, named[name])[1:] == ((again.data_ptr(), named[name].data_ptr()), known)
    negative = torch.complex(torch.zeros(SHAPE), torch.zeros(SHAPE)).conj().imag
    for other in (*named.values(), negative, named[name].detach().requires_grad_(named[name].is_floating_point())):
        found, plain = calls.find(again, other), Sketches().sketch((again, other))
        assert plain is not None
        assert found[1] == plain[0]
        is_alike = type(other) is type(again) and plain[2] == Sketches().sketch((again, named[name]))[2]  # type: ignore[index]
        assert (found[2] is known) == is_alike
        assert calls.repeat(again, named[name]) is known  # recognised again, once it is repeated again


def test_a_repeated_call_that_gives_an_array_twice_is_known() -> None:
    calls = Calls(2)
    first, second = torch.zeros(3, 4), torch.zeros(3, 4)
    known = calls.repeat(first, second)
    assert calls.find(first, first)[1:] == ((first.data_ptr(),) * 2, known)


def test_repeated_calls_are_recognised_in_inference_mode() -> None:
    calls = Calls(1)
    with torch.inference_mode():
        known = calls.repeat(torch.zeros(3, 4))
        assert calls.is_recognised(torch.zeros(3, 4))
        assert calls.find(torch.zeros(3, 4))[2] is known
        assert calls.find(torch.zeros(4, 3))[2] is None


def test_numbers_in_the_places_of_arrays_count_in_repeated_calls() -> None:
    calls, tensor = Calls(2), torch.zeros(3)
    known = calls.repeat(tensor, 0.5)
    assert calls.find(tensor, 0.5)[1:] == ((tensor.data_ptr(), 0), known)
    found = calls.find(tensor, 0.25)
    assert found[2] is None
    assert found[0][-1][-1] == 0.25


def test_two_numbers_in_the_place_of_an_array_count_too() -> None:
    calls, tensor = Calls(2), torch.zeros(3)
    known = calls.repeat(tensor, (0.5, 0.25))
    assert calls.find(tensor, (0.5, 0.25))[1:] == ((tensor.data_ptr(), 0), known)
    found = calls.find(tensor, (0.5, 0.125))
    assert found[2] is None
    assert found[0][-1][-1] == (0.5, 0.125)
    for other in ((0.5, 1), (0.5,), [0.5, 0.25], (tensor, 0.5), (0.5, 0.25, 1.0)):
        calls.repeat(tensor, (0.5, 0.25))
        assert not calls.is_recognised(tensor, other)
        assert calls.find(tensor, other) is None


def test_pairs_are_recognised() -> None:
    calls = Calls(2, pairs=1)
    first, second, third = (torch.zeros(SHAPE) for _ in range(3))
    known = calls.repeat((first, second), third)
    addresses = first.data_ptr(), second.data_ptr(), third.data_ptr()
    assert calls.find((first, second), third)[1:] == (addresses, known)
    for other in ((first,), (first, second, third), [first, second], first, (first, second[0]), (first, None), None):
        assert not calls.is_recognised(other, third)
    assert calls.find((first, second, third), third) is None
    calls.repeat(first, third)
    assert not calls.is_recognised((first, second), third)


@pytest.mark.parametrize("value", [1, 1.0, True, None, "1", 512], ids=repr)
def test_options_count_with_their_types(value: Any) -> None:
    calls, tensor = Calls(1), torch.zeros(3)
    known = calls.repeat(tensor, options=(value, "auto"))
    for other in (1, 1.0, True, None, "1", 512, 2):
        is_same = type(other) is type(value) and other == value
        assert calls.is_recognised(tensor, options=(other, "auto")) == is_same
    assert not calls.is_recognised(tensor, options=(value,))
    assert not calls.is_recognised(tensor, options=(value, "auto", None))
    equal = int("512") if value == 512 else value  # equal options need not be the same object
    assert calls.find(tensor, options=(equal, "".join(["au", "to"])))[2] is known


def test_the_kind_of_the_plan_and_the_settings_count() -> None:
    calls, tensor, kind = Calls(1), torch.zeros(3), object()
    known = calls.repeat(tensor, kind=kind)
    assert calls.find(tensor, kind=object())[2] is None
    assert calls.repeat(tensor, kind=kind) is known
    found = calls.known.find((tensor,), (512,), kind, object())  # type: ignore[arg-type]
    assert found is not None
    assert found[2] is None


def test_misaligned_addresses_of_repeated_calls_are_left_to_the_checks() -> None:
    calls = Calls(2)
    memory = torch.zeros(64)
    q, other = memory[:8], memory[16:24]
    known = calls.repeat(q, other)
    assert calls.is_recognised(other, q)
    assert not calls.is_recognised(memory[1:9], q)
    found = calls.known.find((memory[1:9], q), (512,), None, get_settings())
    assert found is not None
    assert found[1:] == ((q.data_ptr() + 4, q.data_ptr()), None)
    assert calls.find(q, other)[2] is known


def test_a_torch_without_guards_knows_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch._C._dynamo.guards", None)
    monkeypatch.setattr(repeated, "_tensor_guards", repeated._tensor_guards.__wrapped__)
    calls, tensor = Calls(1), torch.zeros(3)
    found = [calls.find(tensor) for _ in range(REPEATS + 1)]
    assert found[0][2] is None
    assert all(one[1:] == ((tensor.data_ptr(),), found[0][0]) for one in found[1:])
    assert not calls.is_recognised(tensor)


def test_a_repeated_call_without_memory_is_not_found() -> None:
    calls, tensor = Calls(1), torch.zeros(3, 4)
    calls.repeat(tensor)
    tensor.untyped_storage().resize_(0)
    assert not calls.is_recognised(tensor)
    assert calls.find(tensor) is None


def test_recognisers_keep_no_array_alive() -> None:
    calls = Calls(1)
    tensor = torch.zeros(3, 4)
    calls.repeat(tensor)
    finalizer = weakref.finalize(tensor, int)
    del tensor
    assert not finalizer.alive
    assert calls.is_recognised(torch.zeros(3, 4))
