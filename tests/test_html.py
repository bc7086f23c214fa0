"""What notebooks show: well-formed tables with the values in them, and nothing that runs."""

from __future__ import annotations

from xml.etree import ElementTree

import ml_dtypes
import numpy as np

from cupy_mla import plan_decode
from cupy_mla.bench import BenchCase, Measurement, Results, Row
from cupy_mla.call.problem import DecodeProblem, PagedKeys, Queries
from cupy_mla.decode.plan import DecodePlan
from cupy_mla.layouts import BF16
from cupy_mla.shown.html import facts_table, grid_table

HOSTILE = '<script>alert("&")</script>'


def cells(html: str) -> list[list[str]]:
    """Texts of the rows of all tables; fails on HTML that is not well formed."""
    tree = ElementTree.fromstring(f"<div>{html}</div>")
    return [[cell.text or "" for cell in row] for row in tree.iter("tr")]


def a_problem() -> DecodeProblem:
    queries = Queries(
        batch=2,
        seqlen_q=1,
        total_q=2,
        num_heads_q=16,
        num_heads_kv=1,
        latent_dim=512,
        rope_dim=64,
        dtype="bfloat16",
        causal=False,
        ragged=False,
    )
    return DecodeProblem(queries, PagedKeys(page_size=64, max_pages_per_seq=3), BF16)


def test_facts_table() -> None:
    html = facts_table("A & B", {"count": 3, HOSTILE: HOSTILE})
    assert cells(html) == [["count", "3"], [HOSTILE, HOSTILE]]
    assert "<script" not in html
    assert "A &amp; B</caption>" in html


def test_grid_table() -> None:
    html = grid_table(HOSTILE, ["a", HOSTILE], [[1, 2.5], [HOSTILE, "x"]], notes=[HOSTILE, "second"])
    assert cells(html) == [["a", HOSTILE], ["1", "2.5"], [HOSTILE, "x"]]
    assert "<script" not in html
    assert html.count("<div>") == 2
    assert "<caption" not in grid_table("", [], [])


def test_a_problem_shows_every_field_and_the_shapes_of_its_results() -> None:
    problem = a_problem()
    shown = dict(cells(problem._repr_html_()))
    for part in (problem.queries, problem.keys):
        for name in part.__dataclass_fields__:
            assert shown[name] == str(getattr(part, name))
    assert shown["layout"] == "bf16"
    assert shown["out"] == "[2, 1, 16, 512]"
    assert shown["lse"] == "[2, 16, 1]"
    assert shown["longest sequence"] == "192"


def test_a_plan_of_the_numpy_backend_says_that_it_plans_nothing() -> None:
    q = np.zeros((2, 1, 16, 576), ml_dtypes.bfloat16)
    kv_cache = np.zeros((4, 64, 1, 576), ml_dtypes.bfloat16)
    plan = plan_decode(q, kv_cache, np.zeros((2, 3), np.int32), np.array([64, 3], np.int32))
    shown = dict(cells(plan._repr_html_()))
    assert shown["device"] == "cpu:0"
    assert "plans nothing" in shown["kernel"]
    assert shown["batch"] == "2"


def test_a_plan_of_the_gpu_shows_its_kernel_and_bounds() -> None:
    """A plan with memory of the host behind it: the table looks at none."""

    class Config:
        name = "narrow16<x>"

    class Shape:
        num_parts, blocks_per_job, max_items, max_slots, fixed_split_tokens = 132, 1, 134, 133, 512
        max_seqlen_k = 192

    class Kind:
        problem, location, num_sms = a_problem(), ("cuda", 3), 132
        config, shape = Config, Shape
        plan_bytes, partial_out_bytes, workspace_bytes = 256, 256, 3 << 20

    plan = DecodePlan(Kind.problem, Kind.location, np.zeros(1), Kind)  # type: ignore[arg-type]
    shown = dict(cells(plan._repr_html_()))
    assert shown["device"] == "cuda:3"
    assert shown["kernel"] == "narrow16<x>"
    assert shown["parts"] == "132, CTAs of each: 1"
    assert shown["fixed split, tokens"] == "512"
    assert shown["workspace"] == "3.0 MiB"


def test_results_show_rows_and_failures() -> None:
    case = BenchCase(1, 64, 8)
    peers = {"torch": Measurement(us=25.0), "fa3": Measurement(failure=HOSTILE)}
    html = Results({"device": HOSTILE, "date": "today"}, None, [Row(case, Measurement(us=10.0), peers)])._repr_html_()
    header, row = cells(html)
    shown = dict(zip(header, row, strict=True))
    assert shown["case"] == "b1_k64_h8_q1"
    assert shown["torch us"] == "25.0"
    assert row[header.index("torch us") + 1] == "2.50"
    assert f"b1_k64_h8_q1: fa3 failed: {HOSTILE}" in [
        div.text for div in ElementTree.fromstring(f"<div>{html}</div>").iter("div")
    ]
    assert "<script" not in html
