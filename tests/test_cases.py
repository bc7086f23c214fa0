"""Cases: lengths, presets, files, builders, the work they stand for, and their comparison with float64."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cupy_mla import mla_decode
from cupy_mla.arrays.dtypes import numpy_dtype
from cupy_mla.call.describe import describe_decode
from cupy_mla.call.options import read_call
from cupy_mla.call.problem import MAX_TOKENS
from cupy_mla.decode.reference import mla_decode_reference
from cupy_mla.errors import InvalidArgumentError, MissingDependencyError
from cupy_mla.lab import build as build_module
from cupy_mla.lab import case_files, cases
from cupy_mla.lab.accuracy import LSE_BOUNDS, OUT_BOUNDS, choose_requests, decode_float64, measure_accuracy
from cupy_mla.lab.array_files import read_arrays, write_arrays
from cupy_mla.lab.build import LAYERS_IN_POOL, PADDING_COLUMNS, PADDING_TOKENS, build_case, deal_pages
from cupy_mla.lab.cases import Case, parts_of
from cupy_mla.lab.lengths import mid_decode_lengths, read_lengths, shipped_lengths
from cupy_mla.lab.libraries import NUMPY, ArrayLibrary, TorchLibrary
from cupy_mla.lab.presets import PRESETS, find_preset
from cupy_mla.lab.selftest import CHECK_CASES
from cupy_mla.lab.sparse_cases import SparseCase
from cupy_mla.lab.spec import DTYPES, KV_SCALE, SPARE_PAGES, STORAGES, CaseSpec
from cupy_mla.lab.timing import COLD_BYTES, graph_shape
from cupy_mla.lab.work import visible_pairs

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SUFFIXES = (".npz", ".safetensors")


def small_case(**changes: Any) -> Case:
    arguments: dict[str, Any] = {"num_heads_q": 4, "latent_dim": 64, "rope_dim": 64, "page_size": 16, "seed": 3}
    return build_case(CaseSpec((40, 0, 17, 1), **{**arguments, **changes}))


def stored(case: Case, **more: Any) -> dict[str, Any]:
    """What a user would put in a file."""
    arrays = {name: getattr(case, name) for name in (*cases.TENSORS, "cu_seqlens_q") if getattr(case, name) is not None}
    return {**arrays, "head_dim_v": np.int64(case.head_dim_v), "causal": np.bool_(case.causal), **more}


# --- lengths and presets ---


def test_shipped_lengths_are_real_requests() -> None:
    requests = read_lengths(shipped_lengths())
    assert requests.shape == (1024, 2)
    assert requests[0].tolist() == [374, 44]
    readme = shipped_lengths().with_name("README.md").read_text(encoding="utf-8")
    assert "Splitwise" in readme
    assert "CC-BY 4.0" in readme


@pytest.mark.parametrize(
    "header",
    [
        "context_tokens,generated_tokens",
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "context_tokens, generated_tokens",
        "context_tokens ,generated_tokens ",
        "context_tokens,\tgenerated_tokens",
        '"context_tokens", "generated_tokens"',
        "context tokens,Generated Tokens",
        "contextTokens,GENERATED_TOKENS",
    ],
)
@pytest.mark.parametrize("blank", ["", " "])
def test_lengths_are_read_by_column_name(tmp_path: Path, header: str, blank: str) -> None:
    row = f"7,{blank}3" if header.lower().startswith(("context", '"context')) else f"noon,7,{blank}3"
    file = tmp_path / "lengths.csv"
    file.write_text(f"{header}\n{row}\n")
    assert read_lengths(file).tolist() == [[7, 3]]


def test_generated_tokens_may_be_unknown(tmp_path: Path) -> None:
    file = tmp_path / "lengths.csv"
    file.write_text("context_tokens\n7\n8\n")
    assert read_lengths(file).tolist() == [[7, 0], [8, 0]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tokens\n3\n", "context_tokens"),
        ("context_tokens\n", "at least one request"),
        ("context_tokens\n4\nmany\n", "line 3"),
        ("context_tokens\n-4\n", "'-4'"),
        ("context_tokens,generated_tokens\n4\n", "None"),
        (f"context_tokens\n{MAX_TOKENS + 1}\n", f"up to {MAX_TOKENS}, got '{MAX_TOKENS + 1}' in line 2"),
        (f"context_tokens\n{2**63}\n", "line 2"),
        pytest.param(f"context_tokens\n{'9' * 5000}\n", "line 2", id="more digits than int() takes"),
        (f"context_tokens,generated_tokens\n1,1\n{MAX_TOKENS},1\n", "up to 0, got '1' in line 3"),
        ("context_tokens,generated_tokens\n9000000000000000000,9000000000000000000\n", "line 2"),
        ("", "context_tokens"),
        ("context_tokens,ContextTokens\n1,2\n", "one column context_tokens"),
        ("context_tokens,generated_tokens,generated_tokens\n1,2,3\n", "one column generated_tokens"),
        ("context_tokens\n4\n4,5\n", "1 values, one a column, got more in line 3"),
        ("context_tokens;generated_tokens\n4;5\n", "context_tokens;generated_tokens"),
    ],
)
def test_wrong_lengths_are_named(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "lengths.csv"
    file.write_text(text)
    with pytest.raises(InvalidArgumentError, match=words) as caught:
        read_lengths(file)
    assert caught.value.argument == "lengths"


def test_the_longest_request_is_read(tmp_path: Path) -> None:
    file = tmp_path / "lengths.csv"
    file.write_text(f"context_tokens,generated_tokens\n{MAX_TOKENS - 1},1\n")
    assert mid_decode_lengths(read_lengths(file), 1, seed=0)[0] in (MAX_TOKENS - 1, MAX_TOKENS)


def test_missing_lengths_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="nowhere"):
        read_lengths(tmp_path / "nowhere.csv")


def test_mid_decode_lengths_lie_between_prompt_and_whole_answer() -> None:
    requests = np.array([[10 * i, i] for i in range(1, 200)])
    lengths = mid_decode_lengths(requests, 199, seed=1)
    order = np.argsort(lengths)
    context = np.sort(requests[:, 0])
    assert (lengths[order] >= context).all()
    assert np.array_equal(lengths, mid_decode_lengths(requests, 199, seed=1))
    assert not np.array_equal(lengths, mid_decode_lengths(requests, 199, seed=2))
    assert set(mid_decode_lengths(np.array([[5, 2]] * 300), 300, seed=0)) == {5, 6, 7}


@pytest.mark.parametrize("batch", [0, 6])
def test_mid_decode_lengths_refuse_a_batch_that_the_file_has_not(batch: int) -> None:
    with pytest.raises(InvalidArgumentError, match="batch: expected 1 to 5"):
        mid_decode_lengths(np.ones((5, 2), dtype=np.int64), batch, seed=0)


def test_presets() -> None:
    assert PRESETS["deepseek-v3"].heads_per_rank(8) == 16
    assert find_preset("kimi-k2").heads_per_rank(1) == 64
    with pytest.raises(InvalidArgumentError, match="tp: expected a divisor of the 128 heads"):
        PRESETS["deepseek-v3"].heads_per_rank(3)
    with pytest.raises(InvalidArgumentError, match="preset: expected one of deepseek-v3"):
        find_preset("gpt-2")


# --- built cases ---


def test_built_case_has_the_shapes_of_the_contract() -> None:
    case = build_case(CaseSpec((130, 0, 64), 8, seqlens_q=2, page_size=64))
    assert case.q.shape == (3, 2, 8, 576)
    assert case.q.dtype == BFLOAT16
    assert case.kv_cache.shape == (4, 64, 1, 576)
    assert case.kv_cache.dtype == BFLOAT16
    assert case.cache_seqlens.tolist() == [130, 0, 64]
    assert case.cache_seqlens.dtype == np.int32
    assert case.block_table.shape == (3, 3)
    assert case.block_table.dtype == np.int32
    used = case.block_table[case.block_table != cases.NO_PAGE]
    assert sorted(used) == [0, 1, 2, 3]
    assert (case.block_table == cases.NO_PAGE).sum(axis=1).tolist() == [0, 3, 2]
    assert case.head_dim_v == 512
    assert case.library is NUMPY


def test_ragged_case() -> None:
    case = small_case(seqlens_q=(2, 1, 0, 3), dtype="float16")
    assert case.q.shape == (6, 4, 128)
    assert case.q.dtype == np.float16
    assert case.cu_seqlens_q is not None
    assert case.cu_seqlens_q.tolist() == [0, 2, 3, 3, 6]
    assert case.cu_seqlens_q.dtype == np.int32


def test_case_of_empty_requests() -> None:
    case = build_case(CaseSpec((0, 0), 1))
    assert case.kv_cache.shape[0] == 1
    assert case.block_table.shape == (2, 1)


def test_seed_decides_the_case() -> None:
    first, same, other = small_case(), small_case(), small_case(seed=4)
    for name in cases.TENSORS:
        assert getattr(first, name).tobytes() == getattr(same, name).tobytes()
    assert first.kv_cache.tobytes() != other.kv_cache.tobytes()
    assert first.q.tobytes() != other.q.tobytes()


def test_values_are_normal() -> None:
    values = build_case(CaseSpec((4096,), 1)).kv_cache.astype(np.float64)
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01


@pytest.mark.parametrize("causal", [False, True])
def test_visible_pairs_counts_the_mask(causal: bool) -> None:
    lengths, q_lengths = np.array([0, 1, 2, 5, 40, 7]), np.array([3, 1, 5, 5, 4, 0])
    counted = 0
    for length, s_q in zip(lengths, q_lengths, strict=True):
        for i in range(s_q):
            counted += max(0, length - s_q + i + 1) if causal else length
    assert visible_pairs(lengths, q_lengths, causal) == counted


def test_work_of_the_anchor_shape() -> None:
    """128 requests of 8,192 tokens, 128 heads: 2,176 FLOP per head and token, 1,152 bytes per token."""
    case = build_case(CaseSpec((64,), 128))
    tokens = 64
    assert case.work.flops == 128 * tokens * 2176
    assert case.work.bytes == tokens * 1152 + 128 * (576 + 512) * 2


def test_work_counts_kv_heads_and_query_tokens() -> None:
    case = small_case(num_heads_kv=2, seqlens_q=(1, 2, 0, 2))  # lengths 40, 0, 17, 1; the third has no query
    assert case.work.bytes == 2 * ((40 + 0 + 1) * 2 * 128 + 5 * 4 * (128 + 64))
    assert case.work.flops == 2 * (128 + 64) * 4 * (40 + 0 + 0 + 2)


@pytest.mark.parametrize("seqlens_q", [2, (2, 1, 0, 3)])
def test_a_request_alone_gives_its_part_of_the_result(seqlens_q: Any) -> None:
    case = small_case(seqlens_q=seqlens_q, causal=True)
    problem, inputs = describe_decode(*read_call(*case.tensors, **case.options))
    out, lse = mla_decode_reference(problem, inputs, problem.queries.default_softmax_scale, dtype=np.float64)
    for index in np.flatnonzero(case.q_lengths).tolist():
        alone_out, alone_lse = decode_float64(case.request(index))
        of_request = case.request_result(index, out, lse)
        np.testing.assert_array_equal(of_request[0], alone_out[0])
        np.testing.assert_array_equal(of_request[1], alone_lse[0])


# --- files ---


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("seqlens_q", [1, (2, 1, 0, 3)])
def test_case_comes_back_from_a_file(tmp_path: Path, suffix: str, seqlens_q: Any) -> None:
    case = small_case(seqlens_q=seqlens_q, causal=True)
    path = tmp_path / f"case{suffix}"
    write_arrays(path, stored(case, softmax_scale=np.float64(0.25)))
    loaded = case_files.load_case(path)
    for name in (*cases.TENSORS, "kv_lengths", "q_lengths"):
        expected = getattr(case, name)
        assert getattr(loaded, name).dtype == expected.dtype
        assert getattr(loaded, name).tobytes() == expected.tobytes()
    assert (loaded.cu_seqlens_q is None) == (case.cu_seqlens_q is None)
    assert (loaded.softmax_scale, loaded.causal, loaded.head_dim_v) == (0.25, True, 64)


def test_settings_have_the_defaults_of_the_call(tmp_path: Path) -> None:
    case = build_case(CaseSpec((5,), 2))
    path = tmp_path / "case.npz"
    write_arrays(path, {name: getattr(case, name) for name in cases.TENSORS})
    loaded = case_files.load_case(path)
    assert (loaded.softmax_scale, loaded.causal, loaded.head_dim_v) == (None, False, 512)


def test_bits_and_wide_integers_are_taken(tmp_path: Path) -> None:
    """As a framework without bfloat16 in NumPy would save them."""
    case = small_case()
    path = tmp_path / "case.npz"
    changed = {"q": case.q.view(np.uint16), "kv_cache": case.kv_cache.view(np.uint16)}
    wide = {name: getattr(case, name).astype(np.int64) for name in ("block_table", "cache_seqlens")}
    write_arrays(path, {**stored(case), **changed, **wide})
    loaded = case_files.load_case(path)
    assert loaded.q.dtype == BFLOAT16
    assert loaded.q.tobytes() == case.q.tobytes()
    assert loaded.block_table.dtype == np.int32


def test_safetensors_package_reads_and_writes_the_same(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors.numpy")
    case = small_case()
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    arrays = {name: getattr(case, name) for name in cases.TENSORS}
    write_arrays(ours, arrays)
    for name, array in package.load_file(ours).items():
        assert array.dtype == arrays[name].dtype
        assert array.tobytes() == arrays[name].tobytes()
    settings = {"causal": "True", "softmax_scale": "0.5", "head_dim_v": "64"}
    package.save_file(arrays, theirs, metadata={"format": "pt", **settings})
    loaded = case_files.load_case(theirs)
    assert (loaded.softmax_scale, loaded.causal, loaded.head_dim_v) == (0.5, True, 64)
    assert loaded.kv_cache.tobytes() == case.kv_cache.tobytes()


def test_metadata_of_others_is_ignored_and_an_unknown_array_is_not(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "case.safetensors"
    arrays = {name: np.asarray(value) for name, value in stored(small_case()).items()}
    metadata = {"format": "pt", "q": "text", "softmax_scale": "0.5"}
    package.save_file({**arrays, "format": np.zeros(2, np.int32)}, path, metadata)
    with pytest.raises(InvalidArgumentError, match="also format"):
        case_files.load_case(path)
    package.save_file(arrays, path, metadata)
    loaded = case_files.load_case(path)
    assert loaded.softmax_scale == 0.5
    assert loaded.q.tobytes() == small_case().q.tobytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_result_is_saved(tmp_path: Path, suffix: str) -> None:
    out, lse = np.ones((2, 1, 4, 64), dtype=BFLOAT16), np.full((2, 4, 1), -np.inf, dtype=np.float32)
    path = tmp_path / f"result{suffix}"
    case_files.save_result(path, out, lse)
    found = read_arrays(path)
    assert found["out"].dtype == BFLOAT16
    assert found["out"].tobytes() == out.tobytes()
    assert found["lse"].tobytes() == lse.tobytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": None}, "input: expected an array q"),
        ({"cu_seqlen_q": np.zeros(5, np.int32)}, "also cu_seqlen_q"),
        ({"cu_seqlens_q": np.array([0, 1], np.int32)}, r"cu_seqlens_q: expected batch \+ 1"),
        ({"cu_seqlens_q": np.array([0, 2, 1, 3, 4], np.int32)}, "cu_seqlens_q: expected .* never fall"),
        ({"block_table": np.zeros(4, np.int32)}, r"block_table: expected 2 dimension\(s\)"),
        ({"cache_seqlens": np.zeros(4, np.float32)}, "cache_seqlens: expected int32"),
        ({"cache_seqlens": np.full(4, 2**40)}, "cache_seqlens: expected int32"),
        ({"softmax_scale": np.ones((2, 2))}, r"softmax_scale: expected a single value .*, got shape \(2, 2\)$"),
        ({"softmax_scale": np.complex128(1j)}, "softmax_scale: expected a single value .*1j"),
        ({"causal": np.int64(2)}, "causal: expected a single value"),
        ({"head_dim_v": np.float64(64.7)}, r"head_dim_v: expected a single value \(a whole number\), got 64.7"),
        ({"head_dim_v": np.array("64.7")}, "head_dim_v: expected .*64.7"),
        ({"head_dim_v": np.complex128(64)}, "head_dim_v: expected .*64"),
        ({"head_dim_v": np.float64(np.inf)}, "head_dim_v: expected .*inf"),
        ({"head_dim_v": np.float64(np.nan)}, "head_dim_v: expected .*nan"),
        ({"head_dim_v": np.datetime64("2030-01-01")}, "head_dim_v: expected .*2030"),
    ],
)
def test_wrong_case_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    arrays = {name: array for name, array in {**stored(small_case()), **changes}.items() if array is not None}
    path = tmp_path / "case.npz"
    write_arrays(path, arrays)
    with pytest.raises(InvalidArgumentError, match=words):
        case_files.load_case(path)


def saved(path: Path, arrays: dict[str, Any]) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    "change",
    [
        np.asfortranarray,
        lambda array: array.astype(array.dtype.newbyteorder(">")) if array.dtype != BFLOAT16 else array,
    ],
    ids=["Fortran order", "big-endian"],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_how_an_archive_stores_its_arrays_does_not_matter(tmp_path: Path, dtype: str, change: Any) -> None:
    case = small_case(dtype=dtype, seqlens_q=2)
    arrays = {name: change(array) for name, array in stored(case).items()}
    loaded = case_files.load_case(saved(tmp_path / "case.npz", arrays))
    out, lse = mla_decode(*loaded.tensors, **loaded.options)
    expected_out, expected_lse = mla_decode(*case.tensors, **case.options)
    assert out.tobytes() == expected_out.tobytes()
    assert lse.tobytes() == expected_lse.tobytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_may_have_a_scale_of_each_part(tmp_path: Path, suffix: str) -> None:
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    case = replace(build_case(CaseSpec((40, 3), 2, layout="fp8_e4m3")), kv_scale=(0.5, 0.25))
    path = tmp_path / f"case{suffix}"
    arrays = {**stored(case), "kv_cache": case.kv_cache.view(np.uint8)}
    write_arrays(path, arrays | {"kv_scale": np.array(case.kv_scale, np.float32)})
    loaded = case_files.load_case(path)
    assert loaded.kv_scale == case.kv_scale
    for ours, theirs in zip(loaded.run(), case.run(), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    write_arrays(path, arrays | {"kv_scale": np.ones(3, np.float32)})
    with pytest.raises(InvalidArgumentError, match=r"kv_scale: expected a single value .* got shape \(3,\)"):
        case_files.load_case(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_e4m3_case_comes_back_from_a_file(tmp_path: Path, suffix: str) -> None:
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    case = build_case(CaseSpec((40, 3), 2, layout="fp8_e4m3", compute="exact"))
    path = tmp_path / f"case{suffix}"
    settings = {"kv_scale": np.float32(case.kv_scale)} | ({"compute": np.array("exact")} if suffix == ".npz" else {})
    write_arrays(path, {**stored(case), "kv_cache": case.kv_cache.view(np.uint8), **settings})
    loaded = case_files.load_case(path)
    assert loaded.kv_scale == case.kv_scale
    assert loaded.compute == ("exact" if suffix == ".npz" else "auto")
    for ours, theirs in zip(loaded.run(), case.run(), strict=True):
        assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("split", [("q",), ("kv_cache",), ("q", "kv_cache")])
def test_a_case_may_hold_pairs(tmp_path: Path, suffix: str, split: tuple[str, ...]) -> None:
    case = small_case(seqlens_q=2, causal=True)
    arrays = stored(case)
    for name in split:
        rope = {"q": "q_rope", "kv_cache": "kv_rope"}[name]
        arrays[name], arrays[rope] = np.split(arrays[name], [64], -1)
    write_arrays(tmp_path / f"case{suffix}", arrays)
    loaded = case_files.load_case(tmp_path / f"case{suffix}")
    for name in ("q", "kv_cache"):
        assert isinstance(getattr(loaded, name), tuple) == (name in split)
    assert loaded.work == case.work
    out, lse = mla_decode(*loaded.tensors, **loaded.options)
    expected_out, expected_lse = mla_decode(*case.tensors, **case.options)
    assert out.tobytes() == expected_out.tobytes()
    assert lse.tobytes() == expected_lse.tobytes()


def test_an_npy_file_is_named_as_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "case.npz"
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(InvalidArgumentError, match=r"input: .*one array without a name, as in an \.npy file"):
        case_files.load_case(path)
    path.write_text("q,kv_cache")
    with pytest.raises(InvalidArgumentError, match=r"input: .*no archive of arrays"):
        case_files.load_case(path)


@pytest.mark.parametrize("use", [case_files.load_case, lambda path: write_arrays(path, {})])
def test_safetensors_is_named_where_it_is_missing(use: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "\.\[safetensors\]"'):
        use(tmp_path / "case.safetensors")
    assert not list(tmp_path.iterdir())


def test_types_that_numpy_has_not_are_named(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "case.safetensors"
    path.write_bytes(safetensors_bytes({"q": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}, bytes(4)))
    with pytest.raises(InvalidArgumentError, match=r"input: .*q has the type F8_E4M3"):
        case_files.load_case(path)


def test_a_whole_number_may_be_a_float(tmp_path: Path) -> None:
    path = tmp_path / "case.npz"
    write_arrays(path, stored(small_case(), head_dim_v=np.float64(64)))
    loaded = case_files.load_case(path)
    assert type(loaded.head_dim_v) is int
    assert loaded.head_dim_v == 64


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def npy_bytes(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


def npz_bytes(member: bytes, method: int = 0) -> bytes:
    """An archive with one member, marked as packed by this method of compression (0: stored)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("q.npy", member)
    content = bytearray(buffer.getvalue())
    content[content.index(b"PK\x01\x02") + 10] = method
    return bytes(content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        (2**62).to_bytes(8, "little") + b"{}",
        safetensors_bytes(b"{not json"),
        safetensors_bytes({"q": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),
        safetensors_bytes({"q": {"dtype": "F32", "shape": [3], "data_offsets": [0, 16]}}, bytes(16)),
        safetensors_bytes({"q": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}, bytes(16)),
        safetensors_bytes({"q": {"dtype": "F77", "shape": [4], "data_offsets": [0, 16]}}, bytes(16)),
        safetensors_bytes({"q": {"shape": [4]}}),
        safetensors_bytes([1, 2]),
        pytest.param(safetensors_bytes(b"[" * 100_000), id="nested"),
        safetensors_bytes({"__metadata__": {"softmax_scale": [1, [2]]}}),
        npz_bytes(b"not an array"),
        npz_bytes(npy_bytes("{'descr': ((((")),
        npz_bytes(npy_bytes(f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({10**30},)}}")),
        npz_bytes(npy_bytes("{}"), method=99),
    ],
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_file_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"case{suffix}"
    path.write_bytes(content)
    with pytest.raises(InvalidArgumentError, match="input: expected a readable"):
        case_files.load_case(path)


@pytest.mark.parametrize("name", ["case.pt", "nowhere.npz", "nowhere.safetensors"])
def test_unreadable_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"input: .*{name}"):
        case_files.load_case(tmp_path / name)


def test_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="save: expected a file that can be written"):
        write_arrays(tmp_path / "no" / "folder.npz", {})


# --- accuracy ---


def exact_result(case: Case) -> tuple[Any, Any]:
    problem, inputs = describe_decode(*read_call(*case.tensors, **case.options))
    return mla_decode_reference(problem, inputs, problem.queries.default_softmax_scale)


@pytest.mark.parametrize("dtype", OUT_BOUNDS)
def test_numpy_backend_is_within_the_bounds(dtype: str) -> None:
    case = small_case(dtype=dtype, seqlens_q=2, causal=True)
    accuracy = measure_accuracy(case, *exact_result(case), range(case.batch))
    assert accuracy.passed
    assert 0 < accuracy.out_error < accuracy.out_bound


@pytest.mark.parametrize(
    ("array", "value"),
    [("out", np.nan), ("out", 1.0), ("lse", np.nan), ("lse", 0.0), ("lse", -np.inf)],
)
def test_a_wrong_value_is_found(array: str, value: float) -> None:
    case = small_case()
    out, lse = exact_result(case)
    if array == "out":
        out[2, 0, 1, :8] = value
    else:
        lse[2, 1, 0] = value
    assert not measure_accuracy(case, out, lse, range(case.batch)).passed
    assert measure_accuracy(case, out, lse, [0, 1, 3]).passed


def test_an_empty_request_must_be_exactly_nothing() -> None:
    case = small_case()
    out, lse = exact_result(case)
    out[1, 0, 0, 0] = 1e-6
    assert not measure_accuracy(case, out, lse, [1]).passed
    out[1] = 0
    lse[1] = np.inf
    assert not measure_accuracy(case, out, lse, [1]).passed


def test_chosen_requests_include_the_longest_and_the_shortest() -> None:
    case = build_case(CaseSpec((5, 9, 2, 7, 3, 8), 1, latent_dim=64, rope_dim=0))
    for seed in range(5):
        chosen = choose_requests(case, 3, seed)
        assert len(set(chosen)) == 3
        assert {1, 2} <= set(chosen)
        assert chosen == sorted(chosen)
    assert choose_requests(case, 1) == [1]
    assert choose_requests(case, 100) == list(range(6))


# --- the self-test and timing ---


LIBRARIES = ("numpy", "torch")


def library_named(name: str) -> ArrayLibrary:
    if name == "numpy":
        return NUMPY
    pytest.importorskip("torch")
    return TorchLibrary("cpu")


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padded", [False, True])
def test_poison_is_wherever_no_token_is(padded: bool, dtype: str, name: str) -> None:
    spec = CaseSpec((0, 1, 65, 130), 2, page_size=64, dtype=dtype, padded=padded, poison=True)
    case = build_case(spec, library_named(name)).on(NUMPY)
    values = case.kv_cache.astype(np.float32)
    taken = set()
    for index, length in enumerate(spec.lengths):
        pages = case.block_table[index, : spec.page_counts[index]]
        taken |= set(pages.tolist())
        own = values[pages].reshape(-1, 576)
        assert np.isfinite(own[:length]).all()
        assert not np.isfinite(own[length:]).any()
    spare = [page for page in range(len(values)) if page not in taken]
    assert len(spare) == SPARE_PAGES
    assert np.isnan(values[spare]).any()
    assert np.isinf(values[spare]).any()
    assert not np.isfinite(values[spare]).any()
    used = np.arange(case.block_table.shape[1]) < spec.page_counts[:, None]
    garbage = case.block_table[~used]
    assert (garbage < 0).any()
    assert (garbage >= len(values)).any()
    assert np.isfinite(case.q.astype(np.float32)).all()


def test_chosen_tokens_are_those_of_their_request() -> None:
    spec = CaseSpec((0, 30, 200), 2, page_size=16, topk=50, seqlens_q=2, seed=3)
    case = build_case(spec)
    assert isinstance(case, SparseCase)
    table, _ = deal_pages(spec)
    for request, length in enumerate(spec.lengths):
        pages = set(table[request, : spec.page_counts[request]].tolist())
        for slots in case.indices[request]:
            chosen = slots[slots >= 0]
            assert len(set(chosen.tolist())) == len(chosen) == min(length, 50)
            assert set((chosen // 16).tolist()) <= pages
    assert (case.indices[2, 0] != case.indices[2, 1]).any()
    assert case.counts.tolist() == spec.chosen.tolist() == [[0, 0], [30, 30], [50, 50]]


@pytest.mark.parametrize("prefill", [False, True])
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_sparse_case_is_poisoned_and_comes_apart(name: str, prefill: bool) -> None:
    lengths, seqlen_q = ((200,), 9) if prefill else ((0, 30, 200), 2)
    fields = {"topk_length": True, "attn_sink": True, "padded": True, "page_size": 16, "prefill": prefill}
    spec = CaseSpec(lengths, 4, topk=60, seqlens_q=seqlen_q, poison=True, **fields)
    host = build_case(spec)
    case = host.on(library_named(name))
    assert isinstance(case, SparseCase)
    assert case.batch == (9 if prefill else 3)
    assert np.isposinf(host.attn_sink).any()
    assert np.isneginf(host.attn_sink).any()
    assert (host.indices < -1).any()
    assert (host.indices >= spec.num_pages * spec.page_size).any()
    out, lse, *_ = case.run(case.plan())
    accuracy = measure_accuracy(case, out, lse, range(case.batch))
    assert accuracy.passed
    assert len(accuracy.requests) == case.batch
    # A token that does not count, or is counted wrongly, shows.
    longest = int(host.kv_lengths.argmax())
    request = host.request(longest)
    assert request.counts.sum() == host.kv_lengths[longest]
    assert request.kv_cache.shape[0] <= spec.num_pages
    expected, _ = request.exact()
    assert np.isfinite(expected).all()
    fewer, _ = replace(request, topk_length=request.topk_length - 1).exact()
    assert np.abs(fewer - expected).max() > 1e-6


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("storage", STORAGES)
def test_an_e4m3_case_is_poisoned_in_every_storage(storage: str, name: str) -> None:
    spec = CaseSpec((0, 1, 65, 130), 2, layout="fp8_e4m3", storage=storage, padded=True, poison=True)
    case = build_case(spec, library_named(name))
    assert case.kv_scale == KV_SCALE
    assert {part.dtype.name for part in parts_of(case.on(NUMPY).kv_cache)} == {"float8_e4m3fn"}
    host = build_case(replace(spec, storage="packed", padded=False)).kv_cache.astype(np.float32)
    stored = [case.library.download(part).astype(np.float32) for part in parts_of(case.kv_cache)]
    np.testing.assert_array_equal(np.concatenate(stored, -1), host)
    table, unused = deal_pages(spec)
    assert np.isnan(host[unused]).all()
    assert np.isnan(host[table[2, 1], 1:]).all()
    assert np.isfinite(host[table[2, 1], 0]).all()
    out, lse, *_ = case.run(case.plan())
    accuracy = measure_accuracy(case, out, lse, range(4))
    assert accuracy.passed
    assert accuracy.lse_bound == LSE_BOUNDS["split"]
    assert case.work.bytes == spec.work.bytes == 196 * 576 + 4 * 2 * (576 + 512) * 2


def test_large_quantised_caches_repeat_their_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "_QUANTISED_TOKENS", 32)
    cache = build_case(CaseSpec((80,), 1, layout="fp8_e4m3", page_size=16)).kv_cache.view(np.uint8)
    assert (cache[0] != cache[1]).any()
    np.testing.assert_array_equal(cache[[2, 3, 4]], cache[[0, 1, 0]])


def test_checks_are_poisoned() -> None:
    assert all(case.poison for case in CHECK_CASES)
    assert any(case.padded for case in CHECK_CASES)


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
def test_every_storage_holds_the_same_values(storage: str, padded: bool, name: str) -> None:
    library = library_named(name)
    plain = build_case(CaseSpec((20, 3), 2, page_size=16), library).on(NUMPY)
    stored = build_case(CaseSpec((20, 3), 2, page_size=16, storage=storage, padded=padded), library)
    for array, expected, widths in ((stored.q, plain.q, [512, 64]), (stored.kv_cache, plain.kv_cache, [512, 64])):
        parts = [library.download(part) for part in parts_of(array)]
        assert [part.shape[-1] for part in parts] == (widths if storage == "split" else [sum(widths)])
        np.testing.assert_array_equal(np.concatenate(parts, -1).view(np.uint16), expected.view(np.uint16))
    if name == "numpy":
        first = parts_of(stored.kv_cache)[0]
        rows = first.shape[-1] + (PADDING_COLUMNS if padded else 0)
        tokens = 16 + (PADDING_TOKENS if padded else 0)
        layers = LAYERS_IN_POOL if storage == "strided" else 1
        assert first.strides == tuple(2 * step for step in (layers * tokens * rows, rows, rows, 1))
        gaps = np.lib.stride_tricks.as_strided(first, (16, rows), first.strides[1::2])[:, first.shape[-1] :]
        assert not np.isfinite(gaps.astype(np.float32)).any()


@pytest.mark.parametrize(
    "view",
    [
        lambda array: array,
        lambda array: array[1:, :, 2:6],
        lambda array: array[:, 1],
        lambda array: array.swapaxes(0, 2),
        lambda array: array[:0],
        lambda array: array[2, 3, 4:5],
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int32", "float32"])
def test_arrays_are_moved_with_their_strides(dtype: str, view: Callable[[Any], Any]) -> None:
    library = library_named("torch")
    host = view(np.arange(4 * 5 * 8).reshape(4, 5, 8).astype(numpy_dtype(dtype)))
    moved = library.upload(host)
    assert tuple(moved.shape) == host.shape
    assert [step * host.itemsize for step in moved.stride()] == list(host.strides)
    np.testing.assert_array_equal(library.download(moved), host)


def test_a_case_moves_as_it_lies() -> None:
    host = build_case(CaseSpec((20, 3), 2, seqlens_q=(1, 2), page_size=16, padded=True, poison=True))
    moved = host.on(library_named("torch"))
    assert moved.kv_cache.stride() == tuple(step // 2 for step in host.kv_cache.strides)
    assert moved.on(moved.library) is moved
    for name in (*cases.TENSORS, "cu_seqlens_q"):
        assert moved.library.download(getattr(moved, name)).tobytes() == getattr(host, name).tobytes()
    for index in range(2):
        for ours, theirs in zip(moved.request(index).tensors, host.request(index).tensors, strict=True):
            assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize(
    ("fields", "argument"),
    [
        ({"dtype": "float32"}, "dtype"),
        ({"storage": "scattered"}, "storage"),
        ({"layout": "fp8_e4m3", "dtype": "float16"}, "layout"),
        ({"layout": "fp8_v41"}, "layout"),
        ({"layout": "fp9"}, "layout"),
        ({"compute": "fast"}, "compute"),
        ({"prefill": True}, "prefill"),
        ({"topk_length": True}, "topk_length"),
        ({"attn_sink": True}, "attn_sink"),
        ({"topk": 0}, "topk"),
        ({"topk": 5, "causal": True}, "causal"),
        ({"topk": 5, "seqlens_q": (2,)}, "seqlens_q"),
        ({"topk": 5, "storage": "split"}, "storage"),
        ({"layout": "bf16", "dtype": "float16"}, "layout"),
    ],
)
def test_a_spec_of_something_else_is_refused(fields: dict[str, Any], argument: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        CaseSpec((1,), 1, **fields)
    assert caught.value.argument == argument
    assert CaseSpec((1,), 1, layout="fp16", dtype="float16").layout == "fp16"


def test_a_pair_is_the_same_work_and_the_same_requests() -> None:
    packed, split = (small_case(storage=storage, seqlens_q=2) for storage in ("packed", "split"))
    assert split.work == packed.work
    assert split.dtype == packed.dtype
    for index in range(split.batch):
        results = (decode_float64(case.request(index)) for case in (split, packed))
        for ours, theirs in zip(*results, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_checks_cover_the_contract() -> None:
    assert len(CHECK_CASES) >= 24
    assert len({case.name for case in CHECK_CASES}) == len(CHECK_CASES)
    assert {case.dtype for case in CHECK_CASES} == {"bfloat16", "float16"}
    assert {case.page_size for case in CHECK_CASES} >= {1, 16, 32, 64, 128}
    fp8 = [case for case in CHECK_CASES if case.layout == "fp8_e4m3"]
    assert {case.compute for case in fp8} == {"auto", "exact", "split", "fp8"}
    sparse = [case for case in CHECK_CASES if case.topk is not None]
    assert {case.prefill for case in sparse} == {case.topk_length for case in sparse} == {False, True}
    assert {case.num_heads_q for case in sparse if case.prefill} >= {16, 32, 64, 128}
    assert {case.num_heads_q for case in sparse if not case.prefill} >= {1, 8, 16, 32, 64, 128}


@pytest.mark.parametrize("megabytes", [0.0001, 0.07, 1, 5, 100, 199, 201, 255, 300, 5000])
def test_copies_of_the_cache_exceed_l2(megabytes: float) -> None:
    cache_bytes = int(megabytes * 1e6)
    calls, copies = graph_shape(cache_bytes)
    assert 1 <= copies <= calls
    assert copies * cache_bytes >= COLD_BYTES or calls == 1024
