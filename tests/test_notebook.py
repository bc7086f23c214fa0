"""The notebook runs from top to bottom, in a kernel of its own, and shows what its text promises."""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path
from typing import Any

import pytest

REASON = "(extra: test) is not installed"
nbformat = pytest.importorskip("nbformat", reason=f"nbclient {REASON}")
nbclient = pytest.importorskip("nbclient", reason=f"nbclient {REASON}")
pytest.importorskip("ipykernel", reason=f"ipykernel {REASON}")
pytest.importorskip("matplotlib", reason=f"matplotlib {REASON}")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "scripts" / "notebooks").glob("*.ipynb"))
CELL_SECONDS = 240  # far more than needed; the GPU compiles kernels in one of them
PNG_START = b"\x89PNG\r\n\x1a\n"


def read(path: Path) -> Any:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook: Any) -> dict[str, Any]:
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def text_of(cell: Any) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def shown(cell: Any, kind: str) -> list[str]:
    return [output.data[kind] for output in cell.outputs if kind in output.get("data", {})]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_committed_with_the_outputs_of_one_run(path: Path) -> None:
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells.values()] == list(range(1, len(cells) + 1))
    for cell in cells.values():
        assert all(output.output_type != "error" for output in cell.outputs)
        for picture in shown(cell, "image/png"):
            assert base64.b64decode(picture).startswith(PNG_START)
    assert sum(len(shown(cell, "image/png")) for cell in cells.values()) >= 6


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The cells of the tour after a run in an empty folder."""
    notebook = read(ROOT / "scripts" / "notebooks" / "tour.ipynb")
    folder = tmp_path_factory.mktemp("tour")
    search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # works uninstalled too
    client = nbclient.NotebookClient(
        notebook, timeout=CELL_SECONDS, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env={**os.environ, "PYTHONPATH": search})  # raises with the traceback of a cell that fails
    assert list(folder.iterdir()) == []
    return code_cells(notebook)


def test_it_decodes_and_is_right(tour: dict[str, Any]) -> None:
    assert "out (4, 1, 16, 512)" in text_of(tour["decode"])
    assert "the empty request: out 0.0  lse -inf" in text_of(tour["decode"])
    assert text_of(tour["exact"]).count("relative error") == 3


def test_its_objects_are_shown_as_html(tour: dict[str, Any]) -> None:
    (plan,) = shown(tour["plan"], "text/html")
    assert "DecodePlan" in plan
    assert "num_heads_q" in plan
    (results,) = shown(tour["sweep"], "text/html")
    assert "cupy-mla us" in results
    assert results.count("<tr>") > 12
    assert "failed" not in results


@pytest.mark.parametrize("name", ["schedule", "roofline", "latency", "fp8", "sparse", "memory"])
def test_its_pictures_are_drawn(tour: dict[str, Any], name: str) -> None:
    (picture,) = shown(tour[name], "image/png")
    assert base64.b64decode(picture).startswith(PNG_START)


def test_what_it_says_of_fp8_is_so(tour: dict[str, Any]) -> None:
    errors = {}
    for line in text_of(tour["fp8"]).splitlines():
        kind, rest = ("plain", line[12:]) if line.startswith("plain") else ("outliers", line[20:])
        errors[kind, rest.split()[0].rstrip(",")] = [float(word) for word in rest.split()[-4:]]
    assert len(errors) == 6
    assert max(errors["plain", "bf16"]) < 3e-3
    for one_scale, of_blocks in zip(errors["plain", "fp8_e4m3"], errors["plain", "fp8_ds_mla"], strict=True):
        assert one_scale == pytest.approx(of_blocks, rel=0.25)  # alike on plain values
    for one_scale, of_blocks in zip(errors["outliers", "fp8_e4m3"], errors["outliers", "fp8_ds_mla"], strict=True):
        assert one_scale > 2 * of_blocks


def test_an_e4m3_cache_is_decoded_as_it_is_stored(tour: dict[str, Any]) -> None:
    assert "1,179,648 bytes for 2,048 tokens" in text_of(tour["fp8_decode"])
    of_stored, of_values = map(float, re.findall(r"\de-\d\d|\d\.\de-\d\d", text_of(tour["fp8_decode"])))
    assert of_stored < 3e-3 < of_values


def test_chosen_tokens_do_the_better_the_more_peaked_attention_is(tour: dict[str, Any]) -> None:
    lines = [line for line in text_of(tour["sparse"]).splitlines() if line.startswith("peak")]
    errors = [[float(word) for word in re.findall(r"tokens (\S+),", line)] for line in lines]
    assert len(errors) == 3
    assert errors[0][1] > errors[1][1] > errors[2][1]  # with 64 tokens
    assert all(of_peak == sorted(of_peak, reverse=True) for of_peak in errors[:2])
    assert max(of_peak[-1] for of_peak in errors) < 1e-3


def test_its_memory_picture_comes_with_the_arithmetic(tour: dict[str, Any]) -> None:
    assert "93.3%" in text_of(tour["memory"])


def test_a_model_of_transformers_gives_the_logits_of_its_own_attention(tour: dict[str, Any]) -> None:
    pytest.importorskip("transformers", reason=f"transformers {REASON}")
    text = text_of(tour["model"])
    assert text.count("ms a token") == 3
    of_eager, of_ours = map(float, re.findall(r"\d\.\de-\d\d", text))
    assert max(of_eager, of_ours) < 2e-2
