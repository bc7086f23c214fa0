"""scripts/races.py and race_units.py without a GPU: what would be put under compute-sanitizer is what is said."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeArray, FakeGpu, fake_gpu
from host_kernels import needs_compiler, run_push, run_push_merge

from cupy_mla.kernels.choose import FAMILIES, GATHERED_FAMILIES
from cupy_mla.kernels.exchange import PUSH_SOURCE
from cupy_mla.kernels.family import DecodeFamily
from cupy_mla.lab import trial
from cupy_mla.lab.libraries import CupyLibrary

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
# Stands in for compute-sanitizer: what it prints and exits with goes by the unit that is named behind --work.
SANITIZER = """#!/bin/sh
lookup() {
    echo '========= Program hit CUDA_ERROR_INVALID_VALUE (error 1) on CUDA API call to cuGetProcAddress_v2.'
}
case "$*" in
*"--work narrow16 "*) sleep 1; echo "========= ERROR SUMMARY: 0 errors" ;;
*"--work narrow32 "*) echo "========= Invalid read"; echo "========= ERROR SUMMARY: 3 errors" ;;
*"--work around "*) lookup; lookup; echo "========= ERROR SUMMARY: 2 errors" ;;
*"--work hazards "*) lookup; echo "========= Invalid read"; echo "========= ERROR SUMMARY: 2 errors" ;;
*"--tool racecheck "*) echo "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warnings)" ;;
*)
    lookup; echo "========="; echo "========= Barrier error"; for i in $(seq 99); do echo "========= frame $i"; done
    echo "killed" >&2; exit 7 ;;
esac
"""


@pytest.fixture(scope="module", autouse=True)
def _scripts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield


@pytest.fixture
def races() -> ModuleType:
    return importlib.import_module("races")


@pytest.fixture
def units() -> ModuleType:
    return importlib.import_module("race_units")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    gpu = fake_gpu(monkeypatch)

    def upload(array: np.ndarray) -> FakeArray:
        return gpu.array(array.shape, str(array.dtype), tuple(step // array.itemsize for step in array.strides))

    def first_tokens(array: FakeArray, place: Any) -> FakeArray:
        assert place == (slice(None), 0)
        shape, strides = array.shape, array.strides
        return gpu.array((shape[0], *shape[2:]), array.dtype, (strides[0], *strides[2:]))

    monkeypatch.setattr(trial, "_upload", upload)
    monkeypatch.setattr(CupyLibrary, "upload", lambda library, array: upload(array))
    monkeypatch.setattr(FakeArray, "__getitem__", first_tokens, raising=False)
    return gpu


@pytest.mark.parametrize("family", [*FAMILIES, *GATHERED_FAMILIES], ids=lambda family: family.name)
def test_each_configuration_is_the_one_that_runs(units: ModuleType, gpu: FakeGpu, family: DecodeFamily) -> None:
    """The script itself refuses another one."""
    run = units.run_gathered if family in GATHERED_FAMILIES else units.run_dense
    for config in units.distinct_configs(family):
        run(config)
        launched = [launch.source for launch in gpu.take()]
        if family in GATHERED_FAMILIES:
            wanted = [prefill.source() for prefill in units.prefill_configs(config)]
            assert launched[-len(wanted) :] == wanted  # not those of another family


@pytest.mark.parametrize("family", [*FAMILIES, *GATHERED_FAMILIES], ids=lambda family: family.name)
def test_so_it_is_for_shards(units: ModuleType, gpu: FakeGpu, family: DecodeFamily) -> None:
    configs = list(units.sharded_configs(family))
    if family not in GATHERED_FAMILIES:
        assert any(config.sharded for config in configs)
    elif "fp8" not in family.name:  # whose shares have the same partial results as whole caches
        assert configs
        assert all(config.scale_parts is not None for config in configs)
    for config in configs:
        (units.run_gathered_shard if family in GATHERED_FAMILIES else units.run_shard)(config)
        sources = {launch.source for launch in gpu.take()}
        assert config.source() in sources


@pytest.mark.parametrize("family", [*FAMILIES, *GATHERED_FAMILIES], ids=lambda family: family.name)
def test_hazards_are_given_to_each_family(units: ModuleType, gpu: FakeGpu, family: DecodeFamily) -> None:
    (units.run_gathered_hazards if family in GATHERED_FAMILIES else units.run_hazards)(family)
    entries = {launch.source.entry for launch in gpu.take()}
    assert next(units.typical_configs(family)).source().entry in entries


def test_shares_have_every_problem_of_a_unit_once(
    races: ModuleType, units: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: list[str] = []
    for name in ("run_gathered_shard", "run_shard"):
        monkeypatch.setattr(units, name, lambda config: run.append(config.name))
    monkeypatch.setattr(CupyLibrary, "synchronize", lambda library: None)
    counts = []
    for tool in ("memcheck", "initcheck", "racecheck"):
        shares = races.shares_of(units.SHARDS, False, tool)
        counts.append(len(shares))
        for share in shares:
            units.run_unit(units.SHARDS, False, share)
        assert sorted(run) == sorted(config.name for config in units.all_sharded_configs())
        run.clear()
    assert 1 < counts[0] == counts[1] < counts[2]  # of the last a process runs fewer


def run_exchange(
    units: ModuleType, patch: pytest.MonkeyPatch, *, in_packets: bool
) -> tuple[list[np.ndarray], list[int]]:
    """By the kernels themselves, on the CPU: what was uploaded, which they have changed, and their grids."""
    uploaded: list[np.ndarray] = []
    grids = []

    def upload(array: np.ndarray) -> np.ndarray:
        uploaded.append(np.ascontiguousarray(array))
        return uploaded[-1]

    def launch(source: Any, grid: Any, block: Any, shared_memory: int, stream: int, arguments: Any) -> None:
        grids.append(grid[0])
        if source is PUSH_SOURCE:
            run_push(arguments[0], grid[0], block[0], 1)
        else:
            run_push_merge("Bf16", arguments[0], grid[0], block[0], 1)

    patch.setattr(trial, "_upload", upload)
    patch.setattr(units, "load", lambda source, device_id: source)
    patch.setattr(units, "launch_kernel", launch)
    units.run_exchange(in_packets=in_packets)
    return uploaded, grids


def merged_with(outs: np.ndarray, lses: np.ndarray, other: np.ndarray, other_lse: float) -> tuple[np.ndarray, ...]:
    """out and lse of the second half of the heads, where all rows of the other rank are the same."""
    own, own_lse = outs[:, :, 7:].astype(np.float64), lses[:, 7:].astype(np.float64)
    lse = np.logaddexp(own_lse, other_lse)
    weights = np.exp(own_lse - lse).swapaxes(1, 2)[..., None]
    return weights * own + (1 - weights) * other, lse


@needs_compiler
def test_rows_that_ranks_hand_to_each_other_come_where_they_are_wanted(
    units: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    (other, mine, _, q, outs, lses, out, lse, *calls), grids = run_exchange(units, monkeypatch, in_packets=False)
    assert grids == [2] * 6
    assert [counts.tolist() for counts in calls] == [[2, 2]] * 3
    queries_end = 4 + q.nbytes // 4 * 2
    for memory in (other, mine):
        queries = memory[4:queries_end].view(q.dtype).reshape(3, 5, 14, 576)
        assert queries[:, :, 7:].tobytes() == q.tobytes()
        assert not queries[:, :, :7].view(np.uint16).any()  # of the other rank
    sent = other[queries_end:][: 4 * 105 * 512 // 2].view(outs.dtype).reshape(2, 2, 3, 5, 7, 512)
    sent_lses = other[queries_end:][4 * 105 * 512 // 2 :].view(np.float32).reshape(2, 2, 3, 5, 7)
    for call in range(2):
        assert sent[call, 1].tobytes() == outs[:, :, :7].tobytes()
        assert sent_lses[call, 1].tobytes() == np.ascontiguousarray(lses[:, :7].swapaxes(1, 2)).tobytes()
    # The other's results are 0, with an lse of 0.
    wanted, wanted_lse = merged_with(outs, lses, np.zeros(512), 0)
    np.testing.assert_allclose(lse, wanted_lse, 1e-5, 1e-5)
    np.testing.assert_allclose(out.astype(np.float64), wanted, 1e-2, 1e-6)


@needs_compiler
def test_so_do_those_that_go_in_packets(units: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    (other, mine, _, q, outs, lses, out, lse, *calls), grids = run_exchange(units, monkeypatch, in_packets=True)
    chunks = q.nbytes // 16
    assert grids == [2] * 2 + [105] * 2
    assert [counts.tolist() for counts in calls] == [[2] * 2, [2] * 105]
    queries = mine[4:][: q.nbytes // 4 * 2].view(q.dtype).reshape(3, 5, 14, 576)
    assert queries[:, :, 7:].tobytes() == q.tobytes()
    ahead = np.tile(np.array([units.AHEAD], np.uint32).view(q.dtype), 288)  # what came from the other rank
    assert (queries[:, :, :7] == ahead).all()
    pairs = other[4 + q.nbytes // 4 * 2 + 4 * 105 * (512 // 2 + 1) :].reshape(-1, 4, 2)  # of a value and a mark
    sent = pairs[: 2 * chunks].reshape(2, chunks, 4, 2)[1]
    assert sent[..., 0].tobytes() == q.tobytes()
    assert (sent[..., 1] == 2).all()
    results = pairs[2 * chunks :].reshape(2, 2, 3, 5, 7, 65, 4, 2)[:, 1]
    for call, of_call in enumerate(results):
        assert of_call[..., :64, :, 0].tobytes() == outs[:, :, :7].tobytes()
        assert of_call[..., 64, 0, 0].tobytes() == np.ascontiguousarray(lses[:, :7].swapaxes(1, 2)).tobytes()
        assert (of_call[..., 1] == call + 1).all()
    other_lse = float(np.array(units.AHEAD, np.uint32).view(np.float32))
    wanted, wanted_lse = merged_with(outs, lses, ahead[:512].astype(np.float64), other_lse)
    np.testing.assert_allclose(lse, wanted_lse, 1e-5, 1e-5)
    np.testing.assert_allclose(out.astype(np.float64), wanted, 1e-2, 1e-2)


def test_another_configuration_is_refused(units: ModuleType, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    config = next(units.typical_configs(FAMILIES[0]))
    monkeypatch.setattr(units, "heads_of", lambda config, tokens: 1)  # which has float32 partial results
    with pytest.raises(RuntimeError, match=r"was wanted, .*_float.* runs"):
        units.run_dense(config)


def test_pages_and_slots_of_every_layout_are_taken(units: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, the same calls."""
    monkeypatch.setattr(trial, "_upload", lambda array: array)
    units.run_cache()
    units.run_around()


def test_each_result_is_printed_when_it_is_known_and_failures_are_counted(
    races: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text(SANITIZER)
    sanitizer.chmod(0o755)
    monkeypatch.setattr(races.shutil, "which", lambda name: str(sanitizer))
    monkeypatch.setattr(races, "compile_for", lambda units, every: None)
    assert races.run_tools(("memcheck",), ["narrow16", "narrow32", "wide64"], False, 3) == 2
    lines = capsys.readouterr().out.splitlines()
    verdicts = [line.split(maxsplit=2)[1:] for line in lines if line.startswith("memcheck")]
    assert verdicts[-1] == ["narrow16", "clean"]  # it takes longest, and was asked for first
    assert sorted(verdicts[:-1]) == [["narrow32", "3 errors"], ["wide64", "did not run"]]
    assert any("Invalid read" in line for line in lines)
    assert any("killed" in line for line in lines)
    # Of a process that failed, what the tool said first.
    assert any("Barrier error" in line for line in lines)
    assert not any("cuGetProcAddress" in line or "frame 99" in line for line in lines)
    assert races.run_tools(("racecheck",), ["cache"], False, 1) == 0
    assert capsys.readouterr().out.split() == ["racecheck", "cache", "clean,", "1", "warnings"]
    # What bindings ask a driver for that is older than they are is no error of ours; others beside it are.
    assert races.run_tools(("memcheck",), ["around"], False, 1) == 0
    assert capsys.readouterr().out.split() == ["memcheck", "around", "clean"]
    assert races.run_tools(("memcheck",), ["hazards"], False, 1) == races.shares_of("hazards", False, "memcheck")[0][1]
    assert "1 errors" in capsys.readouterr().out
