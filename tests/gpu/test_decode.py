"""Every line of the contract that concerns dense decoding, on the GPU, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases_dense import DTYPES, DenseCase, frobenius_error

from cupy_mla import InvalidArgumentError, PlanMismatchError, merge_states, mla_decode, plan_decode
from cupy_mla.arrays.scratch import scratch_like
from cupy_mla.arrays.view import view
from cupy_mla.call.options import AUTO
from cupy_mla.decode import blueprint
from cupy_mla.kernels.choose import DENSE_FAMILIES

from . import gpu_arrays as gpu

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("kernel")]

MAX_ERROR = {"bfloat16": 3e-3, "float16": 1e-3}
FEW_ROWS_ERROR = 2e-3
ROUNDING_OF_OUTPUT = 2e-3  # bfloat16's, 2^-9 at most
EQUAL_WEIGHTS = 1e-20  # a factor on the scores
LSE_TOLERANCE = 1e-5  # relative, and absolute
RUNS = 10
LENGTHS = (0, 1, 63, 64, 65, 140, 4096)


OF_TOKEN_PAGES = [family.name for family in DENSE_FAMILIES if family.gathers]


@pytest.fixture(params=[AUTO, *(family.name for family in DENSE_FAMILIES)])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs on the kernel that is chosen for its case, and on each of the kernels."""
    name: str = request.param
    monkeypatch.setattr(OnGpu, "kernel", name)
    return name


class OnGpu:
    """A case with its arrays on the host and on the GPU."""

    kernel = AUTO  # of the test that runs

    def __init__(self, case: DenseCase) -> None:
        if self.kernel in OF_TOKEN_PAGES:
            case = replace(case, page_size=1)
        self.case = case
        self.host = case.build()
        on_gpu = self.host.on(gpu.LIBRARY)
        self.q, self.kv_cache, self.block_table, self.cache_seqlens = on_gpu.tensors
        self.cu_seqlens_q = on_gpu.cu_seqlens_q

    @property
    def tensors(self) -> tuple[Any, Any, Any, Any]:
        return self.q, self.kv_cache, self.block_table, self.cache_seqlens

    @property
    def options(self) -> dict[str, Any]:
        return {**self.case.options, "cu_seqlens_q": self.cu_seqlens_q}

    @property
    def plan_options(self) -> dict[str, Any]:
        of_plan = {name: value for name, value in self.options.items() if name != "softmax_scale"}
        return {**of_plan, "kernel": self.kernel}

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (*self.host.q.shape[:-1], self.case.latent_dim)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        heads = self.case.num_heads_q
        if self.case.ragged:
            return heads, self.host.q.shape[0]
        return self.host.q.shape[0], heads, self.host.q.shape[1]

    def decode(self, *tensors: Any, **options: Any) -> tuple[Any, Any]:
        """Of these tensors instead of the case's, if any; with a plan where it takes one to name the kernel."""
        tensors = tensors or self.tensors
        if self.kernel != AUTO and "plan" not in options:
            options["plan"] = plan_decode(*tensors, **self.plan_options)
        return mla_decode(*tensors, **self.options, **options)

    def check(self, out: Any, lse: Any, lengths: tuple[int, ...] | None = None) -> None:
        check_results(self.case, gpu.expected(self.case, self.host, lengths), out, lse)


def check_results(case: DenseCase, exact: list[tuple[np.ndarray, np.ndarray]], out: Any, lse: Any) -> None:
    """Out and lse of every request against float64."""
    gpu.synchronize()
    out, lse = gpu.download(out), gpu.download(lse)
    row = 0
    for request, (exact_out, exact_lse) in enumerate(exact):
        seqlen_q = exact_out.shape[0]
        request_out = out[row : row + seqlen_q] if case.ragged else out[request]
        request_lse = lse[:, row : row + seqlen_q].T if case.ragged else lse[request].T
        row += seqlen_q
        check_request(f"request {request}", case.dtype, (request_out, request_lse), (exact_out, exact_lse))


def check_request(
    name: str, dtype: str, result: tuple[np.ndarray, np.ndarray], exact: tuple[np.ndarray, np.ndarray]
) -> None:
    (out, lse), (exact_out, exact_lse) = result, exact
    assert out.shape == exact_out.shape
    assert np.isfinite(out).all(), f"{name}: {np.count_nonzero(~np.isfinite(out))} values are not finite"
    error = frobenius_error(out, exact_out)
    assert error < MAX_ERROR[dtype], f"{name}: relative error {error:.2e}"
    unseen = np.isneginf(exact_lse)
    assert (out[unseen] == 0).all(), f"{name}: a query that sees nothing has an output other than 0"
    assert np.array_equal(np.isneginf(lse), unseen), f"{name}: lse is -inf at other queries than it should"
    difference = np.abs(lse[~unseen] - exact_lse[~unseen])
    allowed = LSE_TOLERANCE * (1 + np.abs(exact_lse[~unseen]))
    assert (difference <= allowed).all(), f"{name}: lse off by {difference.max():.2e}"


def run(case: DenseCase, **options: Any) -> None:
    on_gpu = OnGpu(case)
    on_gpu.check(*on_gpu.decode(**options))


# Shapes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 3, 8, 12, 16, 32, 63, 64, 96, 126, 128])
def test_heads(heads: int) -> None:
    run(DenseCase(lengths=LENGTHS, num_heads_q=heads))


@pytest.mark.parametrize("seqlen_q", [1, 2])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 1), (8, 2), (8, 1), (13, 1), (16, 1)])
def test_few_rows_that_see_few_keys(
    kernel: str, heads: int, kv_heads: int, seqlen_q: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One key may have most of a row's weight, and what bf16 makes of that weight does not show. The rounding of the
    output alone gives 1.7e-3."""
    gpu.skip_where_not_refined(kernel, heads // kv_heads * seqlen_q)
    monkeypatch.setitem(MAX_ERROR, "bfloat16", FEW_ROWS_ERROR)
    rng = np.random.default_rng(heads)
    lengths = (*rng.integers(1, 40, 150).tolist(), *rng.integers(1, 900, 30).tolist())
    scale = 2 * DenseCase().scale  # a few keys have most of the weight of all
    case = DenseCase(lengths, heads, num_heads_kv=kv_heads, seqlens_q=seqlen_q, softmax_scale=scale)
    on_gpu = OnGpu(case)
    # Uncut, as partial results are rounded too.
    whole = plan_decode(*on_gpu.tensors, **on_gpu.plan_options, fixed_split_tokens=1024)
    on_gpu.check(*on_gpu.decode(plan=whole))


@pytest.mark.parametrize("heads", [5, 47, 128])
def test_tokens_that_weigh_the_same(kernel: str, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What their weights lose by rounding is the same of all, and would not average out; here nothing is lost."""
    monkeypatch.setitem(MAX_ERROR, "bfloat16", ROUNDING_OF_OUTPUT)
    run(DenseCase(lengths=tuple(range(1, 65)), num_heads_q=heads, softmax_scale=EQUAL_WEIGHTS))


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (16, 2), (16, 8), (128, 2), (128, 8)])
def test_kv_heads(heads: int, kv_heads: int) -> None:
    run(DenseCase(lengths=(0, 65, 140, 1000), num_heads_q=heads, num_heads_kv=kv_heads))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_q", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("heads", [3, 16, 128])
def test_seqlen_q(heads: int, seqlen_q: int, causal: bool) -> None:
    run(DenseCase(lengths=(0, 1, 2, 15, 64, 65, 140, 1500), num_heads_q=heads, seqlens_q=seqlen_q, causal=causal))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (16, 1), (16, 2), (96, 1), (128, 1)])
def test_ragged(heads: int, kv_heads: int, causal: bool) -> None:
    case = DenseCase(
        lengths=(140, 64, 0, 1000, 1, 65),
        seqlens_q=(1, 0, 3, 16, 2, 4),
        num_heads_q=heads,
        num_heads_kv=kv_heads,
        causal=causal,
    )
    run(case)


def test_ragged_with_plan_and_bound() -> None:
    on_gpu = OnGpu(DenseCase(lengths=(140, 640, 0), seqlens_q=(1, 4, 2), causal=True))
    plan = plan_decode(*on_gpu.tensors, **on_gpu.plan_options, max_seqlen_q=4)
    on_gpu.check(*on_gpu.decode(plan=plan))


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 140, 4096])
@pytest.mark.parametrize("heads", [16, 128])
def test_one_request(heads: int, length: int) -> None:
    run(DenseCase(lengths=(length,), num_heads_q=heads))


@pytest.mark.parametrize("heads", [16, 128])
def test_long_request(heads: int) -> None:
    run(DenseCase(lengths=(131072,) if heads == 16 else (3, 131072, 140), num_heads_q=heads))


def test_many_requests() -> None:
    lengths = tuple(int(length) for length in np.random.default_rng(1).integers(0, 700, 300))
    run(DenseCase(lengths=lengths, num_heads_q=16))


@pytest.mark.parametrize("page_size", [1, 16, 32, 48, 64, 128, 256])
@pytest.mark.parametrize("heads", [16, 64])
def test_page_sizes(heads: int, page_size: int) -> None:
    run(DenseCase(lengths=(0, 1, 63, 64, 65, 140, 1000), num_heads_q=heads, page_size=page_size))


@pytest.mark.parametrize(("latent_dim", "rope_dim"), [(512, 64), (512, 0), (256, 64), (256, 0), (128, 64)])
@pytest.mark.parametrize("heads", [16, 64])
def test_widths(heads: int, latent_dim: int, rope_dim: int) -> None:
    run(DenseCase(lengths=(0, 64, 140, 1000), num_heads_q=heads, latent_dim=latent_dim, rope_dim=rope_dim))


@pytest.mark.parametrize("kernel", [AUTO, "narrow16", "narrow32"], indirect=True)
@pytest.mark.parametrize(("latent_dim", "rope_dim"), [(64, 0), (320, 64), (384, 0), (512, 128), (512, 512)])
@pytest.mark.parametrize("heads", [16, 64])
def test_widths_that_the_wide_kernel_is_not_made_for(heads: int, latent_dim: int, rope_dim: int) -> None:
    run(DenseCase(lengths=(0, 64, 140, 1000), num_heads_q=heads, latent_dim=latent_dim, rope_dim=rope_dim))


@pytest.mark.parametrize("heads", [16, 128])
def test_fp16(heads: int) -> None:
    run(DenseCase(lengths=LENGTHS, num_heads_q=heads, dtype="float16"))


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0])
def test_softmax_scale(scale: float) -> None:
    run(DenseCase(lengths=(64, 1000), softmax_scale=scale))


# Rows that see no key, in requests that are whole and in ones cut so that whole pieces are beyond their rows' masks.
EMPTY_ROWS = {
    "empty requests": (DenseCase(lengths=(0, 140, 0, 4096)), None),
    "causal": (DenseCase(lengths=(0, 1, 2, 3, 64, 1500), seqlens_q=4, causal=True), None),
    "causal, more queries than keys": (DenseCase(lengths=(40, 200, 65, 0, 1000), seqlens_q=90, causal=True), None),
    "cut everywhere": (DenseCase(lengths=(40, 200, 65, 0, 1000), seqlens_q=90, causal=True), 64),
    "ragged": (DenseCase(lengths=(2, 100, 0, 3000), seqlens_q=(4, 130, 3, 1), causal=True), None),
}


@pytest.mark.parametrize("name", EMPTY_ROWS)
@pytest.mark.parametrize("heads", [3, 16, 128])
def test_empty_lse(heads: int, name: str) -> None:
    case, fixed_split_tokens = EMPTY_ROWS[name]
    on_gpu = OnGpu(replace(case, num_heads_q=heads))
    plan = plan_decode(*on_gpu.tensors, **on_gpu.plan_options, fixed_split_tokens=fixed_split_tokens)
    first_out, first_lse = on_gpu.decode(plan=plan)
    on_gpu.check(first_out, first_lse)
    neutral = gpu.download(first_lse)
    assert np.isneginf(neutral).any()
    outputs = {"out": gpu.empty(on_gpu.out_shape, "bfloat16"), "lse": gpu.empty(on_gpu.lse_shape, "float32")}
    for empty_lse in (math.inf, -math.inf, math.inf):  # by turns: calls are remembered, with what they were told
        out, lse = on_gpu.decode(plan=plan, empty_lse=empty_lse, **outputs)
        assert np.array_equal(gpu.download(lse), np.where(np.isneginf(neutral), empty_lse, neutral))
        assert np.array_equal(gpu.bits_of(out), gpu.bits_of(first_out))


# Memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 1), (64, 1), (16, 2)])
def test_padded(heads: int, kv_heads: int, page_size: int) -> None:
    run(DenseCase(lengths=LENGTHS, num_heads_q=heads, num_heads_kv=kv_heads, page_size=page_size, padded=True))


def test_ragged_padded() -> None:
    run(DenseCase(lengths=(140, 1000), seqlens_q=(3, 2), padded=True, causal=True))


@pytest.mark.parametrize("heads", [16, 64])
def test_pool_of_layers(heads: int) -> None:
    on_gpu = OnGpu(DenseCase(num_heads_q=heads, lengths=(65, 1000)))
    pages, *rest = on_gpu.host.kv_cache.shape
    pool = gpu.full((pages, 3, *rest), "bfloat16", gpu.NAN_BITS)
    gpu.assign(pool[:, 1], on_gpu.kv_cache)
    on_gpu.kv_cache = pool[:, 1]
    on_gpu.check(*on_gpu.decode())


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("heads", [16, 64])
def test_pairs(heads: int, separate: bool) -> None:
    on_gpu = OnGpu(DenseCase(num_heads_q=heads, lengths=(0, 65, 1000)))
    packed_out, packed_lse = on_gpu.decode()

    def pair(device: Any, host: np.ndarray) -> tuple[Any, Any]:
        if separate:
            return gpu.upload(host[..., :512]), gpu.upload(host[..., 512:])
        return device[..., :512], device[..., 512:]

    q, kv_cache = pair(on_gpu.q, on_gpu.host.q), pair(on_gpu.kv_cache, on_gpu.host.kv_cache)
    out, lse = on_gpu.decode(q, kv_cache, on_gpu.block_table, on_gpu.cache_seqlens)
    on_gpu.check(out, lse)
    assert np.array_equal(gpu.bits_of(out), gpu.bits_of(packed_out))
    assert np.array_equal(gpu.bits_of(lse), gpu.bits_of(packed_lse))


@pytest.mark.parametrize("heads", [16, 128])
def test_cache_beyond_32_bits(heads: int, kernel: str) -> None:
    page_size = 1 if kernel in OF_TOKEN_PAGES else 64
    num_pages, length = 60_000 * 64 // page_size, 1000
    assert num_pages * page_size * 576 > 2**31
    used = -(-length // page_size)
    case = DenseCase(lengths=(length,), num_heads_q=heads)
    random = np.random.default_rng(0)
    dtype = DTYPES["bfloat16"]
    keys = random.standard_normal((used * page_size, 1, 576), np.float32).astype(dtype)
    q = random.standard_normal((1, 1, heads, 576), np.float32).astype(dtype)
    kv_cache = gpu.full((num_pages, page_size, 1, 576), "bfloat16", gpu.NAN_BITS)
    gpu.assign(kv_cache[num_pages - used :], gpu.upload(keys.reshape(used, page_size, 1, 576)))
    block_table = np.arange(num_pages - used, num_pages, dtype=np.int32)[None, :]
    lengths = np.array([length], np.int32)
    tensors = gpu.upload(q), kv_cache, gpu.upload(block_table), gpu.upload(lengths)
    out, lse = mla_decode(*tensors, plan=None if kernel == AUTO else plan_decode(*tensors, kernel=kernel))
    check_results(case, [gpu.attention(keys[:length], q[0], 512, case.scale, False)], out, lse)


@pytest.mark.parametrize("page_size", [1, 16, 64, 128])
def test_pages_outside_the_cache(page_size: int) -> None:
    case = DenseCase(lengths=(300, 300, 300, 300, 140), page_size=page_size, num_heads_q=16)
    on_gpu = OnGpu(case)
    case = on_gpu.case
    table = on_gpu.host.block_table.copy()
    num_pages = on_gpu.host.kv_cache.shape[0]
    for request, page in enumerate((-1, num_pages, 2**31 - 1, -(2**31))):
        table[request] = page
    out, lse = on_gpu.decode(on_gpu.q, on_gpu.kv_cache, gpu.upload(table), on_gpu.cache_seqlens)
    gpu.synchronize()
    request_out, request_lse = gpu.download(out)[-1], gpu.download(lse)[-1].T
    check_request(
        "the request with good pages", case.dtype, (request_out, request_lse), gpu.expected(case, on_gpu.host)[-1]
    )
    with pytest.raises(InvalidArgumentError, match=r"block_table\[0, 0\]"):
        mla_decode(on_gpu.q, on_gpu.kv_cache, gpu.upload(table), on_gpu.cache_seqlens, **on_gpu.options, validate=True)
    on_gpu.check(*on_gpu.decode(validate=True))


# Bits ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "seqlen_q"), [(16, 1), (128, 1), (96, 2)])
def test_same_bits_every_run(heads: int, seqlen_q: int) -> None:
    on_gpu = OnGpu(DenseCase(lengths=(0, 140, 4096, 9000, 1), num_heads_q=heads, seqlens_q=seqlen_q))
    first = [gpu.bits_of(array) for array in on_gpu.decode()]
    for _ in range(RUNS - 1):
        again = [gpu.bits_of(array) for array in on_gpu.decode()]
        assert all(np.array_equal(*pair) for pair in zip(first, again, strict=True))


@pytest.mark.parametrize("heads", [16, 128])
def test_fixed_split_gives_the_same_bits_in_any_batch(heads: int) -> None:
    split = 256
    case = DenseCase(lengths=(1000, 140, 5000, 64, 0, 257, 3000), num_heads_q=heads)
    on_gpu = OnGpu(case)
    plan = plan_decode(*on_gpu.tensors, **on_gpu.plan_options, fixed_split_tokens=split)
    out, lse = on_gpu.decode(plan=plan)
    on_gpu.check(out, lse)
    whole_out, whole_lse = gpu.bits_of(out), gpu.bits_of(lse)
    for batch in ((0,), (2,), (4,), (5, 0), (6, 2, 1), (3, 5, 2, 2, 2, 0, 1, 6, 4, 2)):
        rows = list(batch)
        tensors = (
            gpu.upload(on_gpu.host.q[rows]),
            on_gpu.kv_cache,
            gpu.upload(on_gpu.host.block_table[rows]),
            gpu.upload(on_gpu.host.cache_seqlens[rows]),
        )
        other = plan_decode(*tensors, **on_gpu.plan_options, fixed_split_tokens=split)
        out, lse = mla_decode(*tensors, **on_gpu.options, plan=other)
        assert np.array_equal(gpu.bits_of(out), whole_out[rows]), f"batch {batch}"
        assert np.array_equal(gpu.bits_of(lse), whole_lse[rows]), f"batch {batch}"


# Plans, given outputs, graphs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("heads", "seqlen_q"), [(16, 1), (64, 2)])
def test_given_plan_and_outputs(heads: int, seqlen_q: int, strided: bool) -> None:
    on_gpu = OnGpu(DenseCase(lengths=(0, 140, 4096), num_heads_q=heads, seqlens_q=seqlen_q))
    out_shape, lse_shape = on_gpu.out_shape, on_gpu.lse_shape
    if strided:
        out_pool = gpu.empty((*out_shape[:-1], out_shape[-1] + 64), "bfloat16")
        lse_pool = gpu.empty((*lse_shape, 2), "float32")
        out, lse = out_pool[..., : out_shape[-1]], lse_pool[..., 1]
    else:
        out, lse = gpu.empty(out_shape, "bfloat16"), gpu.empty(lse_shape, "float32")
    plan = plan_decode(*on_gpu.tensors, **on_gpu.plan_options)
    for _ in range(3):  # a plan serves every layer
        result_out, result_lse = on_gpu.decode(plan=plan, out=out, lse=lse)
        assert result_out is out
        assert result_lse is lse
    on_gpu.check(out, lse)
    if strided:
        assert np.isnan(gpu.download(out_pool)[..., out_shape[-1] :]).all()
        assert np.isnan(gpu.download(lse_pool)[..., 0]).all()


@pytest.mark.parametrize("heads", [16, 128])
def test_graph_replayed_after_lengths_changed(heads: int) -> None:
    most = (4096, 300, 2000, 64)
    on_gpu = OnGpu(DenseCase(lengths=most, num_heads_q=heads))
    plan = plan_decode(*on_gpu.tensors, **on_gpu.plan_options)
    out, lse = gpu.empty(on_gpu.out_shape, "bfloat16"), gpu.empty(on_gpu.lse_shape, "float32")

    def step() -> None:
        plan.update(on_gpu.cache_seqlens)
        on_gpu.decode(plan=plan, out=out, lse=lse)

    replay = gpu.capture(step)
    for lengths in (most, (0, 0, 0, 0), (1, 300, 0, 63), (4096, 0, 0, 0), (65, 140, 1999, 64), most):
        gpu.assign(on_gpu.cache_seqlens, gpu.upload(np.array(lengths, np.int32)))
        gpu.assign(out, gpu.empty(on_gpu.out_shape, "bfloat16"))
        gpu.assign(lse, gpu.empty(on_gpu.lse_shape, "float32"))
        replay()
        on_gpu.check(out, lse, lengths)


@pytest.mark.parametrize("kernel", [AUTO], indirect=True)  # a plan names any other
def test_workspace_of_a_call_without_plan_stays_with_the_given_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call frees it while the stream is still behind; the current stream must not get that memory meanwhile."""
    workspaces: list[tuple[int, int]] = []

    def recording_scratch_like(owner: Any, size: int, *place: int) -> Any:
        scratch = scratch_like(owner, size, *place)
        workspaces.append((scratch.pointer, size))
        return scratch

    monkeypatch.setattr(blueprint, "scratch_like", recording_scratch_like)
    on_gpu = OnGpu(DenseCase(lengths=(4096,), num_heads_q=16))
    gpu.synchronize()
    with gpu.delayed_stream() as stream:
        out, lse = on_gpu.decode(stream=stream)
        [(begin, size)] = workspaces
        for other in [gpu.allocate(size) for _ in range(4)]:
            pointer = view(other, "other").pointer
            assert pointer + size <= begin or begin + size <= pointer
    on_gpu.check(out, lse)


def test_plan_of_other_shapes_is_refused() -> None:
    on_gpu = OnGpu(DenseCase(num_heads_q=16))
    plan = plan_decode(*OnGpu(DenseCase(num_heads_q=64)).tensors)
    with pytest.raises(PlanMismatchError):
        on_gpu.decode(plan=plan)


# Merging -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty_lse", [-math.inf, math.inf])
@pytest.mark.parametrize(("heads", "shards"), [(16, 2), (128, 3)])
def test_merge_states(heads: int, shards: int, empty_lse: float) -> None:
    case = DenseCase(lengths=(960, 1000, 64, 0), num_heads_q=heads, seqlens_q=2)
    on_gpu = OnGpu(case)
    case = on_gpu.case
    columns = -(-on_gpu.host.block_table.shape[1] // shards)
    outs, lses = [], []
    for shard in range(shards):
        table = on_gpu.host.block_table[:, shard * columns : (shard + 1) * columns]
        first = shard * columns * case.page_size
        lengths = np.clip(on_gpu.host.cache_seqlens - first, 0, table.shape[1] * case.page_size).astype(np.int32)
        tensors = on_gpu.q, on_gpu.kv_cache, gpu.upload(table), gpu.upload(lengths)
        out, lse = on_gpu.decode(*tensors, empty_lse=empty_lse)
        outs.append(out)
        lses.append(lse)
    out, lse = merge_states(gpu.stack(outs), gpu.stack(lses))
    on_gpu.check(out, lse)
    whole_out, whole_lse = on_gpu.decode()
    assert frobenius_error(gpu.download(out), gpu.download(whole_out)) < 2 * MAX_ERROR[case.dtype]
    finite = np.isfinite(gpu.download(whole_lse))
    np.testing.assert_allclose(
        gpu.download(lse)[finite], gpu.download(whole_lse)[finite], rtol=2 * LSE_TOLERANCE, atol=2 * LSE_TOLERANCE
    )


# Errors --------------------------------------------------------------------------------------------------------------

Change = Callable[[OnGpu], dict[str, Any]]
BAD_ARGUMENTS: dict[str, tuple[str, Change]] = {
    "q of rank 3": ("q", lambda c: {"q": c.q[0]}),
    "q of float32": ("q", lambda c: {"q": gpu.empty(c.host.q.shape, "float32")}),
    "q on the host": ("", lambda c: {"q": c.host.q}),
    "q with a strided last dimension": ("q", lambda c: {"q": gpu.full((3, 1, 16, 1152), "bfloat16", 0)[..., ::2]}),
    "q misaligned": ("q", lambda c: {"q": gpu.full((3, 1, 16, 584), "bfloat16", 0)[..., 1:577]}),
    "q with odd row strides": ("q", lambda c: {"q": gpu.full((3, 1, 16, 577), "bfloat16", 0)[..., :576]}),
    "cache of another type": ("kv_cache", lambda c: {"kv_cache": gpu.full(c.host.kv_cache.shape, "float16", 0)}),
    "cache of another width": ("kv_cache", lambda c: {"kv_cache": c.kv_cache[..., :512]}),
    "page size 24": ("kv_cache", lambda c: {"kv_cache": gpu.full((9, 24, 1, 576), "bfloat16", 0)}),
    "heads that do not divide": ("q", lambda c: {"kv_cache": gpu.full((9, 64, 3, 576), "bfloat16", 0)}),
    "lengths of int64": ("cache_seqlens", lambda c: {"cache_seqlens": gpu.upload(np.zeros(3, np.int64))}),
    "lengths of another batch": ("cache_seqlens", lambda c: {"cache_seqlens": c.cache_seqlens[:2]}),
    "lengths on the host": ("cache_seqlens", lambda c: {"cache_seqlens": c.host.cache_seqlens}),
    "table of another batch": ("block_table", lambda c: {"block_table": c.block_table[:2]}),
    "table of int64": ("block_table", lambda c: {"block_table": gpu.upload(c.host.block_table.astype(np.int64))}),
    "scale of 0": ("softmax_scale", lambda c: {"softmax_scale": 0.0}),
    "scale of NaN": ("softmax_scale", lambda c: {"softmax_scale": float("nan")}),
    "value width beyond the key": ("head_dim_v", lambda c: {"head_dim_v": 600}),
    "value width of no kernel": ("head_dim_v", lambda c: {"head_dim_v": 500}),
    "causal that is no truth value": ("causal", lambda c: {"causal": 2}),
    "lse of 0 for empty rows": ("empty_lse", lambda c: {"empty_lse": 0.0}),
    "plan that is none": ("plan", lambda c: {"plan": 1}),
    "out of another shape": ("out", lambda c: {"out": gpu.empty((3, 1, 16, 576), "bfloat16")}),
    "out of another type": ("out", lambda c: {"out": gpu.empty((3, 1, 16, 512), "float16")}),
    "lse of another shape": ("lse", lambda c: {"lse": gpu.empty((3, 1, 16), "float32")}),
    "length beyond the table": (
        "cache_seqlens[1]",
        lambda c: {"cache_seqlens": gpu.upload(np.array([1, 10**6, 1], np.int32)), "validate": True},
    ),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_argument_is_refused_and_nothing_written(name: str) -> None:
    argument, change = BAD_ARGUMENTS[name]
    on_gpu = OnGpu(DenseCase(lengths=(140, 64, 1), num_heads_q=16))
    out, lse = gpu.empty((3, 1, 16, 512), "bfloat16"), gpu.empty((3, 16, 1), "float32")
    arguments: dict[str, Any] = {
        "q": on_gpu.q,
        "kv_cache": on_gpu.kv_cache,
        "block_table": on_gpu.block_table,
        "cache_seqlens": on_gpu.cache_seqlens,
        "out": out,
        "lse": lse,
    }
    with pytest.raises(InvalidArgumentError) as caught:
        mla_decode(**{**arguments, **change(on_gpu)})
    if argument:
        assert caught.value.argument == argument
    gpu.synchronize()
    assert np.isnan(gpu.download(out)).all()
    assert np.isnan(gpu.download(lse)).all()
    on_gpu.decode(out=out, lse=lse)
    check_results(replace(on_gpu.case), gpu.expected(on_gpu.case, on_gpu.host), out, lse)
