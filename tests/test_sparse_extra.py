"""Sparse decode over two caches on the CPU, through every interface: values against float64, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases_dense import frobenius_error
from cases_extra import ExtraArrays, ExtraCase, of_plan
from cases_sparse import SparseCase
from cases_sparse_fp8 import Fp8SparseCase
from test_flash_mla_sparse import in_flash_mla
from test_sparse_prefill import MAX_ERROR

from cupy_mla import InvalidArgumentError, PlanMismatchError, flash_mla, mla_sparse_decode, plan_sparse_decode
from cupy_mla.call.sparse import describe_sparse_decode
from cupy_mla.call.sparse_options import SparseDecodeArrays, SparseOptions
from cupy_mla.layouts import LAYOUTS, SPARSE_LAYOUTS

MAIN = SparseCase(batch=3, seqlen_q=2, rope_dim=0)
BASE = ExtraCase.of(MAIN, page_size=8, num_pages=5, topk=70)
FP8 = Fp8SparseCase(batch=3, seqlen_q=2)
CODED = [layout for layout in SPARSE_LAYOUTS if layout.codec]
CASES = {
    "plain": BASE,
    "pages of 2 and 64": ExtraCase.of(replace(MAIN, page_size=64, num_pages=2), page_size=2, num_pages=90, topk=129),
    "lengths": ExtraCase.of(replace(MAIN, lengths="request", sinks=True), lengths="token", topk=64),
    "lengths of the second": ExtraCase.of(MAIN, lengths="request", sinks=True),
    "lengths of the first": ExtraCase.of(replace(MAIN, lengths="token"), lengths=None),
    "nothing in the first": ExtraCase.of(replace(MAIN, invalid=1.0, sinks=True), invalid=0.1),
    "nothing in the second": ExtraCase.of(replace(MAIN, sinks=True), topk=0),
    "nothing at all": ExtraCase.of(replace(MAIN, topk=0), invalid=1.0),
    "kv heads": ExtraCase.of(replace(MAIN, num_heads_kv=2, lengths="token", dtype="float16"), topk=90),
    "odd widths": ExtraCase.of(replace(MAIN, latent_dim=24, rope_dim=7, num_heads_q=3), page_size=61, num_pages=1),
}


def check(results: tuple[Any, Any], exact: tuple[np.ndarray, ...], dtype: str = "bfloat16") -> None:
    out, lse = (np.asarray(result) for result in results)
    for place in np.ndindex(out.shape[:2]):
        assert frobenius_error(out[place], exact[0][place]) < MAX_ERROR[dtype]
    np.testing.assert_allclose(lse, exact[2].swapaxes(1, 2), rtol=1e-5, atol=1e-5)


def refused(arrays: ExtraArrays, **changes: Any) -> InvalidArgumentError:
    with pytest.raises(InvalidArgumentError) as caught:
        mla_sparse_decode(**{**arrays.arguments(), **changes})
    return caught.value


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_float64(case: ExtraCase) -> None:
    arrays = case.build()
    given = {**arrays.arguments(), "strict": False}
    results = mla_sparse_decode(**given)
    check(results, arrays.exact(), case.main.dtype)
    plan = plan_sparse_decode(**of_plan(given))
    for ours, theirs in zip(mla_sparse_decode(**given, plan=plan), results, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("layout", CODED, ids=lambda layout: layout.name)
def test_fp8_caches(layout: Any) -> None:
    main = replace(FP8, layout=layout.name, rope_dim=64 if layout.supports(512, 64) else 0, sinks=True)
    arrays = ExtraCase.of(main, page_size=2, num_pages=70, topk=90, lengths="request").build()
    check(mla_sparse_decode(**arrays.arguments()), arrays.exact())


@pytest.mark.parametrize(("layout", "other"), [("fp8_ds_mla_no_rope", "fp8_v41"), ("fp8_v41", "fp4_v41")])
def test_two_layouts(layout: str, other: str) -> None:
    arrays = ExtraCase.of(replace(FP8, layout=layout, rope_dim=0), layout=other, topk=90).build()
    check(mla_sparse_decode(**arrays.arguments()), arrays.exact())


def test_the_backend_mixes_layouts_that_no_kernel_reads_together() -> None:
    arrays = ExtraCase.of(replace(FP8, layout="fp8_model1", rope_dim=0), layout="fp8_v41", topk=90).build()
    assert refused(arrays).argument == "extra_kv_cache"
    check(mla_sparse_decode(**arrays.arguments(), strict=False), arrays.exact())


def test_the_layout_of_the_second_cache_is_that_of_the_first_unless_its_type_says_another() -> None:
    main = replace(FP8, layout="fp8_ds_mla_no_rope", rope_dim=0)
    arrays = ExtraCase.of(main, topk=90).build()
    given = arrays.arguments()
    expected = mla_sparse_decode(**given)
    del given["extra_layout"]
    for ours, theirs in zip(mla_sparse_decode(**given), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert refused(arrays, layout=None, extra_layout="fp8_ds_mla_no_rope").argument == "layout"


def test_a_16_bit_cache_beside_one_of_fp8() -> None:
    arrays = ExtraCase(replace(FP8, topk=30), replace(FP8, seed=9)).build()
    exact = arrays.exact()
    values = LAYOUTS["fp8_ds_mla"].dequantise(arrays.extra.stored).astype(arrays.main.exact.q.dtype)
    given = {**arrays.arguments(), "extra_kv_cache": values, "extra_layout": None}
    error = refused(arrays, extra_kv_cache=values, extra_layout=None)
    assert error.argument == "extra_kv_cache"
    assert "fp8_ds_mla" in error.expected
    out, _ = mla_sparse_decode(**given, strict=False)
    for place in np.ndindex(out.shape[:2]):
        assert frobenius_error(out[place], exact[0][place]) < MAX_ERROR["bfloat16"]


def test_a_problem_names_both_lists() -> None:
    given = ExtraCase.of(replace(MAIN, lengths="request"), page_size=2, num_pages=9, topk=33, lengths="token").build()
    arrays = {name: value for name, value in given.arguments().items() if name != "head_dim_v"}
    problem, inputs = describe_sparse_decode(SparseDecodeArrays(**arrays), SparseOptions())
    facts = problem.facts()
    assert (facts["topk"], facts["tokens_per_length"]) == (40, 2)
    assert (facts["extra_topk"], facts["extra_tokens_per_length"], facts["extra_layout"]) == (33, 1, "bf16")
    assert problem.keys.most_tokens == 73
    assert inputs.num_extra_slots == 18
    alone = {name: value for name, value in arrays.items() if not name.startswith("extra")}
    facts = describe_sparse_decode(SparseDecodeArrays(**alone), SparseOptions())[0].facts()
    assert facts["extra_topk"] is facts["extra_layout"] is None


def test_a_plan_belongs_to_both_lists() -> None:
    case = ExtraCase.of(replace(MAIN, lengths="request"), lengths="token", topk=70)
    arrays = case.build()
    given = arrays.arguments()
    plan = plan_sparse_decode(**of_plan(given))
    alone = {name: value for name, value in given.items() if not name.startswith("extra")}
    with pytest.raises(PlanMismatchError, match="extra_topk"):
        mla_sparse_decode(**alone, plan=plan)
    with pytest.raises(PlanMismatchError, match="extra_topk"):
        mla_sparse_decode(**{**given, "extra_indices": given["extra_indices"][..., :64]}, plan=plan)
    plan.update(given["topk_length"], given["extra_topk_length"])
    for lengths, argument in (
        ((given["topk_length"], None), "extra_topk_length"),
        ((None, given["extra_topk_length"]), "topk_length"),
        ((given["topk_length"], given["topk_length"]), "extra_topk_length"),
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            plan.update(*lengths)
        assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("changes", "argument", "words"),
    [
        ({"extra_indices": None}, "extra_indices", "an array beside extra_kv_cache"),
        ({"extra_kv_cache": None}, "extra_indices", "None without extra_kv_cache"),
        ({"extra_kv_cache": None, "extra_indices": None}, "extra_topk_length", "None without extra_kv_cache"),
        ({"extra_kv_cache": np.zeros((5, 8, 512), np.float16)}, "extra_kv_cache", "4 dimensions"),
        ({"extra_kv_cache": np.zeros((5, 8, 1, 512), np.float16)}, "extra_kv_cache", "bfloat16"),
        ({"extra_kv_cache": np.zeros((5, 0, 1, 512), np.float16)}, "extra_kv_cache", "no extent of 0"),
        ({"extra_indices": np.zeros((3, 2, 5), np.int64)}, "extra_indices", "int32"),
        ({"extra_indices": np.zeros((3, 3, 5), np.int32)}, "extra_indices", "shape [3, 2, 'topk']"),
        ({"extra_topk_length": np.zeros(4, np.int32)}, "extra_topk_length", "shape [3] or [3, 2]"),
        ({"extra_topk_length": np.full(3, -1, np.int32)}, "extra_topk_length[0]", "0 to 70"),
        ({"extra_topk_length": np.full(3, 71, np.int32)}, "extra_topk_length[0]", "0 to 70"),
        ({"extra_layout": "fp8"}, "extra_layout", "one of"),
        ({"extra_layout": "fp8_ds_mla"}, "q", "a width that the layout fp8_ds_mla has"),
        ({"extra_layout": 7}, "extra_layout", "a string"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], argument: str, words: str) -> None:
    arrays = replace(BASE, extra=replace(BASE.extra, lengths="request")).build()
    error = refused(arrays, **changes)
    assert error.argument == argument
    assert words in error.expected


def test_both_caches_have_as_many_kv_heads() -> None:
    arrays = ExtraCase.of(replace(MAIN, num_heads_kv=2)).build()
    one = ExtraCase.of(MAIN).build().arguments()
    changes = {name: one[name] for name in ("extra_kv_cache", "extra_indices")}
    assert refused(arrays, **changes).argument == "extra_kv_cache"
    alone = {name: value for name, value in arrays.arguments().items() if not name.startswith("extra")}
    with pytest.raises(InvalidArgumentError, match="extra_layout: expected None without extra_kv_cache"):
        mla_sparse_decode(**alone, extra_layout="bf16")


# Other interfaces -----------------------------------------------------------------------------------------------------


def test_flash_mla() -> None:
    """As FlashMLA's own test calls it."""
    case = ExtraCase.of(replace(MAIN, lengths="request", sinks=True), page_size=2, num_pages=40, lengths="request")
    arrays = case.build()
    given = arrays.arguments()

    def call(meta: Any, extra: tuple[Any, ...], extra_length: Any) -> Any:
        return flash_mla.flash_mla_with_kvcache(
            given["q"], given["kv_cache"], None, None, 512, meta, None, 512**-0.5, False, False, given["indices"],
            given["attn_sink"], *extra, given["topk_length"], extra_length,
        )  # fmt: skip

    meta, _ = flash_mla.get_mla_metadata()
    extra = given["extra_kv_cache"], given["extra_indices"]
    for _ in range(2):
        check(call(meta, extra, given["extra_topk_length"]), in_flash_mla(arrays.exact()))
    assert meta.config is not None
    assert (meta.config.extra_page_block_size, meta.config.extra_topk) == (2, case.extra.topk)
    with pytest.raises(PlanMismatchError, match="tile_scheduler_metadata"):
        call(meta, (None, None), None)
    for bad, argument in (
        ((given["extra_kv_cache"][0], extra[1]), "extra_k_cache"),
        ((extra[0], given["extra_indices"][0]), "extra_indices_in_kvcache"),
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            call(flash_mla.get_mla_metadata()[0], bad, given["extra_topk_length"])
        assert caught.value.argument == argument


@pytest.mark.parametrize("layout", [None, "fp8_ds_mla_no_rope"])
@pytest.mark.parametrize("planned", [False, True])
def test_torch_operators(planned: bool, layout: str | None) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("cupy_mla.torch_ops")
    main = replace(MAIN, dtype="float16") if layout is None else replace(FP8, layout=layout, rope_dim=0)
    given = ExtraCase.of(replace(main, lengths="request", sinks=True), lengths="token", topk=70).build().arguments()
    expected = mla_sparse_decode(**given)
    names = {"layout": "cache_layout", "extra_layout": "extra_layout"}
    options = {ours: given.pop(name) for name, ours in names.items() if name in given}
    given.pop("kv_scale", None)
    tensors = {
        name: torch.from_numpy(value.view(np.uint16)).view(torch.bfloat16) if value.dtype.name == "bfloat16"
        else torch.from_numpy(value)
        for name, value in given.items()
        if isinstance(value, np.ndarray)
    }  # fmt: skip
    ops = torch.ops.cupy_mla
    plan = ops.plan_sparse_decode(**of_plan(tensors), **options) if planned else None
    results = ops.mla_sparse_decode(**tensors, **options, plan=plan)
    for ours, theirs in zip(results, expected, strict=True):
        np.testing.assert_array_equal(ours.float().numpy(), np.asarray(theirs, np.float32))
    if planned:
        alone = {name: value for name, value in tensors.items() if not name.startswith("extra")}
        alone_options = {name: value for name, value in options.items() if name != "extra_layout"}
        with pytest.raises(PlanMismatchError):
            ops.mla_sparse_decode(**alone, **alone_options, plan=plan)


@pytest.mark.parametrize("jit", [False, True])
def test_jax(jit: bool) -> None:
    jax = pytest.importorskip("jax", reason="jax is not installed")
    jax_ops = pytest.importorskip("cupy_mla.jax_ops")
    if jax.default_backend() != "cpu":
        pytest.skip("JAX would run it on a GPU")
    case = ExtraCase.of(replace(MAIN, lengths="request", sinks=True), lengths="token", topk=70)
    given = {name: value for name, value in case.build().arguments().items() if isinstance(value, np.ndarray)}
    arrays = {name: jax.numpy.asarray(value) for name, value in given.items()}

    def program(arrays: dict[str, Any]) -> Any:
        plan = jax_ops.plan_sparse_decode(**of_plan(arrays))
        return jax_ops.mla_sparse_decode(**arrays), jax_ops.mla_sparse_decode(**arrays, plan=plan)

    expected = mla_sparse_decode(**given)
    for results in (jax.jit(program) if jit else program)(arrays):
        for ours, theirs in zip(results, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
