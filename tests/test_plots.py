"""Pictures: what is drawn where, from results whose figures are known."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cupy_mla.bench import BenchCase, Ceilings, Measurement, Results, Row, expand_grid
from cupy_mla.bench import panels as panels_module
from cupy_mla.bench import plots as plots_module
from cupy_mla.bench.panels import draw_latency, draw_ratios, draw_roofline, draw_speedups, latency_groups
from cupy_mla.bench.plots import write_plots
from cupy_mla.errors import InvalidArgumentError, MissingDependencyError
from cupy_mla.schedule.make import WHOLE_JOB, make_schedule
from cupy_mla.schedule.picture import draw_schedule
from cupy_mla.schedule.pieces import TILE_COST, PieceCosts
from cupy_mla.schedule.shape import ScheduleShape
from cupy_mla.shown.drawing import format_tokens, make_figure

pytest.importorskip("matplotlib", reason="matplotlib (extra: plot) is not installed")

CEILINGS = Ceilings(4000.0, 800.0, 700.0, "measured")
PNG_START = b"\x89PNG\r\n\x1a\n"


def row_of(case: BenchCase, us: float | None, **peers: float | None) -> Row:
    return Row(case, Measurement(us=us), {name: Measurement(us=time) for name, time in peers.items()})


def some_results(ceilings: Ceilings | None = CEILINGS, traces: int = 1) -> Results:
    cases = expand_grid(batches=(1, 16), lengths=(1024, 8192), heads=(16, 128), traces=traces)
    rows = [row_of(case, 10.0 * (i + 1), flash_mla=15.0 * (i + 1), torch=5.0 * (i + 1)) for i, case in enumerate(cases)]
    return Results({"device": "GPU <1>"}, ceilings, rows)


@pytest.fixture
def axes() -> Any:
    return make_figure(6, 4).subplots()


def legend_texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_all_pictures_are_written(tmp_path: Path) -> None:
    written = write_plots(some_results(), tmp_path)
    assert [path.name for path in written] == ["roofline.png", "latency.png", "ratio.png"]
    assert all(path.parent == tmp_path and path.read_bytes().startswith(PNG_START) for path in written)


def test_pictures_without_content_are_left_out(tmp_path: Path) -> None:
    alone = Results({}, None, [row_of(case, 10.0) for case in expand_grid(batches=(1,), lengths=(64,), heads=(8,))])
    assert [path.name for path in write_plots(alone, tmp_path)] == ["latency.png"]  # there is no roof
    alone.ceilings = CEILINGS
    assert [path.name for path in write_plots(alone, tmp_path)] == ["roofline.png", "latency.png"]
    drawn_lengths = Results({}, None, [row_of(case, 1.0) for case in expand_grid(batches=(2,), lengths=(), traces=1)])
    assert write_plots(drawn_lengths, tmp_path) == []
    failed = Results({}, None, [Row(BenchCase(1, 64, 8), Measurement(failure="no"))])
    assert write_plots(failed, tmp_path) == []


def test_many_cases_go_on_in_further_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots_module, "_PANELS_PER_FIGURE", 1)
    monkeypatch.setattr(plots_module, "_CASES_PER_FIGURE", 3)
    names = [path.name for path in write_plots(some_results(traces=0), tmp_path)]  # 2 head counts, 8 cases
    assert names == ["roofline.png", "latency.png", "latency-2.png", "ratio.png", "ratio-2.png", "ratio-3.png"]


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="folder: expected a folder that can be written to"):
        write_plots(some_results(), tmp_path / "missing")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "\.\[plot\]"'):
        write_plots(some_results(), tmp_path)


def test_roofline_points_are_the_rows_and_lie_below_the_ceilings(axes: Any) -> None:
    results = some_results()
    draw_roofline(axes, results)
    points = [line for line in axes.lines if line.get_linestyle() == "None"]
    roofs = [line for line in axes.lines if line.get_linestyle() in ("-", "--")]
    assert len(points) == 3
    assert len(roofs) == 2
    drawn = {(x, y) for line in points for x, y in zip(*line.get_data(), strict=True)}
    expected = {
        (row.case.work.flops / row.case.work.bytes, row.tflops(side))
        for row in results.rows
        for side in row.measurements
    }
    assert drawn == expected
    xs, ys = roofs[0].get_data()
    for x, y in zip(xs, ys, strict=True):
        assert y == pytest.approx(min(x * 4.0, 800.0))  # 4000 GB/s are 4 TFLOPS at one FLOP per byte
    assert max(roofs[1].get_data()[1]) == 700.0
    assert axes.get_xlabel() == "arithmetic intensity, FLOP per byte"
    assert "GPU <1>" in axes.get_title(loc="left")
    texts = legend_texts(axes)
    assert texts[0] == "800 TFLOPS, 4,000 GB/s (measured)"
    assert texts[2:] == ["cupy-mla", "FlashMLA", "torch's SDPA"]


def test_roofline_without_ceilings_or_times(axes: Any) -> None:
    draw_roofline(axes, some_results(ceilings=None))
    assert legend_texts(axes) == ["cupy-mla", "FlashMLA", "torch's SDPA"]
    empty = make_figure(4, 3).subplots()
    draw_roofline(empty, Results({}))
    assert legend_texts(empty) == ["no case has a time"]


def test_latency_groups_share_all_but_batch_and_length() -> None:
    groups = latency_groups(some_results().rows)
    assert list(groups) == ["h16_q1", "h128_q1"]
    assert all(len(rows) == 4 for rows in groups.values())  # not the drawn lengths
    extra = row_of(BenchCase(1, 1024, 16, causal=True, dtype="float16"), 1.0)
    assert list(latency_groups([*some_results().rows, extra])) == ["h16_q1", "h128_q1", "h16_q1_fp16_causal"]
    ragged = row_of(BenchCase(2, 64, 16, ragged=(1, 2)), 1.0)
    empty = row_of(BenchCase(2, 0, 16), 1.0)  # has no place on a logarithmic axis
    assert latency_groups([ragged, empty, Row(BenchCase(1, 64, 8))]) == {}


def test_latency_has_a_line_for_each_side_and_batch(axes: Any) -> None:
    rows = latency_groups(some_results(traces=0).rows)["h16_q1"]
    rows[3].peers["torch"] = Measurement(failure="out of memory")
    draw_latency(axes, rows, CEILINGS)
    lines = [
        (line.get_color(), line.get_linestyle(), list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines
    ]
    measured = [line for line in lines if line[0] != panels_module.FAINT]
    assert len(measured) == 3 * 2
    assert (panels_module._colour("cupy-mla"), "-", [1024, 8192], [10.0, 30.0]) in measured
    assert (panels_module._colour("torch"), "--", [1024], [25.0]) in measured
    least = [line for line in lines if line[0] == panels_module.FAINT]
    assert len(least) == 2
    assert least[0][3] == [CEILINGS.least_seconds(row.case.work) * 1e6 for row in rows[:2]]
    assert axes.get_title(loc="left") == "16 heads, 1 query token"
    assert legend_texts(axes)[-3:] == ["1 request", "16 requests", "least that this GPU allows"]
    assert axes.get_ylabel() == "time per call, us"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1K", "8K"]


def test_the_ratio_to_the_fastest_peer_is_below_the_times(axes: Any) -> None:
    rows = latency_groups(some_results(traces=0).rows)["h16_q1"]
    rows[0].peers["torch"] = Measurement(failure="out of memory")
    draw_speedups(axes, rows)
    level, first, second = axes.lines
    assert list(level.get_ydata()) == [1.0, 1.0]
    assert (list(first.get_xdata()), list(first.get_ydata())) == ([1024, 8192], [1.5, 0.5])
    assert list(second.get_ydata()) == [0.5, 0.5]
    assert first.get_marker() != second.get_marker()
    assert axes.get_ylabel() == "fastest peer's time / ours"


def test_a_batch_looks_the_same_in_all_panels() -> None:
    few = [row_of(BenchCase(16, 64, 8), 1.0)]
    panels = make_figure(6, 4).subplots(1, 2)
    draw_latency(panels[0], few, batches=[1, 16])
    draw_latency(panels[1], [row_of(BenchCase(1, 64, 8), 1.0), *few], batches=[1, 16])
    assert panels[0].lines[0].get_marker() == panels[1].lines[1].get_marker() != panels[1].lines[0].get_marker()
    assert panels[0].get_legend() is None


def test_titles_say_what_is_not_default(axes: Any) -> None:
    draw_latency(axes, [row_of(BenchCase(4, 64, 1, seqlen_q=2, page_size=16, storage="split", causal=True), 1.0)])
    assert axes.get_title(loc="left") == "1 head, 2 query tokens, p16, split, causal"


def test_ratio_bars_begin_at_one(axes: Any) -> None:
    rows = [row_of(BenchCase(1, 64, 8), 10.0, flash_mla=15.0, fa3=None, torch=5.0)]
    draw_ratios(axes, rows)
    bars = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]
    assert bars == [(1.0, 1.5), (1.0, 0.5)]
    assert [text.get_text() for text in axes.texts] == ["1.50", "0.50"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1 x 64 tokens, 8 heads, 1 query token"]
    assert legend_texts(axes) == ["FlashMLA", "torch's SDPA"]
    low, high = axes.get_xlim()
    assert low < 0.5 < 1.5 < high


@pytest.mark.parametrize(("count", "text"), [(1000, "1000"), (1024, "1K"), (8192, "8K"), (1 << 20, "1M"), (0, "0")])
def test_format_tokens(count: int, text: str) -> None:
    assert format_tokens(count) == text


# --- schedules


SHAPE = ScheduleShape(
    num_parts=6, blocks_per_job=1, rows=64, group_heads=16, num_heads_kv=1, batch=5, seqlen_q=1, max_seqlen_k=4096
)
LENGTHS = np.array([4000, 64, 0, 700, 1500])


@pytest.mark.parametrize("cost", [PieceCosts(), PieceCosts(64, 80, 16)])
@pytest.mark.parametrize("fixed_split_tokens", [None, 512])
def test_a_schedule_s_bars_are_its_pieces(axes: Any, fixed_split_tokens: int | None, cost: PieceCosts) -> None:
    shape = replace(SHAPE, fixed_split_tokens=fixed_split_tokens, cost=cost)
    schedule = make_schedule(shape, LENGTHS)
    draw_schedule(axes, schedule, shape)
    budget = schedule.budget / TILE_COST
    bars = [patch for patch in axes.patches if patch.get_height() == pytest.approx(0.84)]
    work = [bar for bar in bars if bar.get_alpha() is None]
    assert sum(bar.get_width() for bar in work) == sum(-(-LENGTHS // 64))
    assert len(bars) - len(work) == len(schedule.items)  # one overhead each
    hatched = sum(bool(bar.get_hatch()) for bar in work)
    assert hatched == (schedule.items[:, 7] != WHOLE_JOB).sum() > 0
    ends: dict[int, float] = {}
    for bar in bars:  # no two at the same time
        part = round(bar.get_y() + bar.get_height() / 2)
        assert bar.get_x() == pytest.approx(ends.get(part, 0.0))
        ends[part] = bar.get_x() + bar.get_width()
    assert max(ends.values()) == pytest.approx(budget)
    assert axes.lines[0].get_xdata()[0] == budget
    assert {text.get_text() for text in axes.texts} == {"0", "1", "2", "3", "4"}
    assert f"5 jobs in {len(schedule.items)} pieces on 6 parts" in axes.get_title(loc="left")


def test_a_schedule_of_nothing_can_be_drawn(axes: Any) -> None:
    shape = ScheduleShape(
        num_parts=4, blocks_per_job=2, rows=64, group_heads=128, num_heads_kv=1, batch=0, seqlen_q=1, max_seqlen_k=64
    )
    draw_schedule(axes, make_schedule(shape, np.zeros(0, np.int64)), shape, title="nothing")
    assert axes.get_title(loc="left") == "nothing"
    assert axes.get_ylabel() == "part, 2 CTAs"
    assert not axes.texts
