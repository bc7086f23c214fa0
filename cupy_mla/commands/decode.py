"""``cupy-mla decode``: the main job."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ..call.options import AUTO, COMPUTES
from ..errors import InvalidArgumentError
from ..lab.array_files import NPZ, check_suffix
from ..lab.build import build_case
from ..lab.case_files import load_case, save_result
from ..lab.cases import Case, dtype_of, parts_of
from ..lab.files import check_folder, to_json
from ..lab.libraries import LIBRARY_OF_BACKEND
from ..lab.presets import find_preset
from ..lab.sparse_cases import SparseCase
from ..lab.spec import CaseSpec
from ..lab.timing import Timing
from ..layouts import LAYOUTS
from ..shown.tables import print_facts
from .command import Command
from .common import (
    COUNT,
    DEFAULT_BATCH,
    Backend,
    backend_option,
    batch_options,
    busy,
    choose_backend,
    describe_lengths,
    draw_lengths,
    format_time,
    json_option,
    note,
)

if TYPE_CHECKING:
    from ..lab.decode_job import DecodeReport

# A CPU does in seconds what the GPU does in microseconds: a smaller batch unless one is asked for.
DEFAULT_BATCH_ON_CPU = 16
_BUILD_OPTIONS = (
    *("lengths", "batch", "preset", "tp", "dtype", "page_size", "seqlen_q", "causal"),
    *("layout", "compute", "topk"),
)


@click.command(cls=Command, short_help="Decode a batch of real lengths; time and check it.")
@click.option("--input", "input_file", type=click.Path(path_type=Path), help="A case: .npz or .safetensors.")
@batch_options
@click.option(
    "--layout",
    type=click.Choice(list(LAYOUTS)),
    metavar="NAME",
    help=f"Of the cache: one of {', '.join(LAYOUTS)}; that of --dtype unless given.",
)
@click.option("--compute", type=click.Choice(COMPUTES), default=AUTO, show_default=True, help="With an e4m3 cache.")
@click.option("--topk", type=COUNT, help="Tokens that each query token attends to, of those cached: sparse decode.")
@backend_option
@click.option(
    "--sample", type=click.IntRange(min=1), default=4, show_default=True, help="Requests checked against float64."
)
@click.option(
    "--save",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    help="Write out and lse: .npz (bfloat16 as raw bits) or .safetensors.",
)
@json_option
@click.pass_context
def decode(
    ctx: click.Context,
    /,
    input_file: Path | None,
    backend: str,
    sample: int,
    save: Path | None,
    as_json: bool,
    **build: Any,
) -> None:
    """Decode a batch, check a sample against float64, and report time, speed and error.

    Without arguments: a batch of real request lengths in DeepSeek-V3's dimensions. With --input: your own case, a file
    with q, kv_cache, block_table and cache_seqlens, and if need be q_rope, kv_rope (then q and kv_cache are the latent
    parts), cu_seqlens_q, softmax_scale, causal, head_dim_v, kv_scale and compute. NumPy knows no bfloat16: in an .npz
    it is raw bits, read with array.view(ml_dtypes.bfloat16). Exits with 1 if the error is above the bound.
    """
    if save is not None:  # refused before the run, not after it
        check_suffix(save, "save")
        check_folder(save, "save")
        if input_file is not None and os.path.realpath(save) == os.path.realpath(input_file):
            raise InvalidArgumentError("save", "another file than --input", str(save))
    chosen = choose_backend(backend)
    notes = [chosen.note] if chosen.note else []
    if input_file is None:
        case, title = _build(chosen, build, notes)
    else:
        _refuse_build_options(ctx)
        case, title = load_case(input_file).on(LIBRARY_OF_BACKEND[chosen.name]), str(input_file)

    from ..lab.decode_job import run_case

    with busy("first call (kernels are compiled once), timing, check"):
        report = run_case(case, requests_checked=sample, seed=build["seed"])
    facts = {
        "backend": chosen.name,
        "device": chosen.device,
        "case": title,
        "requests": case.batch,
        "kv_tokens": int(case.kv_lengths.sum()),
        "notes": notes,
        **report.as_dict(),
    }
    try:
        if as_json:
            click.echo(to_json(facts, indent=2))
        else:
            _print(facts, case, report.timing)
    finally:  # an output that takes nothing costs the result no more than a full disk costs the report
        if save is not None:
            _save(save, case, report)
    ctx.exit(0 if report.accuracy.passed else 1)


def _save(path: Path, case: Case | SparseCase, report: DecodeReport) -> None:
    save_result(path, *map(case.library.download, (report.out, report.lse)))
    if path.suffix == NPZ and case.dtype == "bfloat16":
        note(f"{path} holds out as raw bits: read it with .view(ml_dtypes.bfloat16)")


def _build(backend: Backend, build: dict[str, Any], notes: list[str]) -> tuple[Case | SparseCase, str]:
    default = DEFAULT_BATCH if backend.name == "cuda" else DEFAULT_BATCH_ON_CPU
    kv_lengths = draw_lengths(build["lengths"], build["batch"], build["seed"], default=default)
    if build["batch"] is None and len(kv_lengths) < default:
        notes.append(f"{len(kv_lengths)} requests: {build['lengths']} has no more")
    elif build["batch"] is None and default != DEFAULT_BATCH:
        notes.append(f"{default} requests on a CPU instead of {DEFAULT_BATCH}; --batch asks for more")
    model = find_preset(build["preset"])
    num_heads_q = model.heads_per_rank(build["tp"])
    spec = CaseSpec(
        tuple(kv_lengths.tolist()),
        num_heads_q,
        latent_dim=model.latent_dim,
        rope_dim=model.rope_dim,
        seqlens_q=build["seqlen_q"],
        dtype=build["dtype"],
        page_size=build["page_size"],
        causal=build["causal"],
        layout=build["layout"],
        compute=build["compute"],
        topk=build["topk"],
        seed=build["seed"],
    )
    lengths = "real lengths that ship with cupy-mla" if build["lengths"] is None else str(build["lengths"])
    lengths = lengths if spec.topk is None else f"top {spec.topk} of {lengths}"
    case = build_case(spec, LIBRARY_OF_BACKEND[backend.name])
    return case, f"{model.name}, {num_heads_q} heads (TP {build['tp']}), {lengths}, seed {build['seed']}"


def _refuse_build_options(ctx: click.Context) -> None:
    """An option that would be ignored is a mistake worth a word."""
    for name in _BUILD_OPTIONS:
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise InvalidArgumentError("--" + name.replace("_", "-"), "nothing beside --input", "both")


def _shape(array: Any) -> str:
    """For example ``[2, 1, 4, 512] + [2, 1, 4, 64], bfloat16``."""
    return " + ".join(str(list(part.shape)) for part in parts_of(array)) + f", {dtype_of(array)}"


def _print(facts: dict[str, Any], case: Case | SparseCase, timing: Timing) -> None:
    for text in facts["notes"]:
        note(text)
    shapes = {name: _shape(array) for name, array in (("q", case.q), ("cache", case.kv_cache))}
    spread = f" ({format_time(timing.fastest)} to {format_time(timing.slowest)})" * (timing.fastest < timing.slowest)
    print_facts(
        "cupy-mla decode",
        {
            "case": facts["case"],
            "batch": describe_lengths(case.kv_lengths),
            **shapes,
            **({"mask": "causal"} if isinstance(case, Case) and case.causal else {}),
            "backend": f"{facts['backend']} on {facts['device']}",
            "first call": f"{facts['first_call_s']:.3f} s (with compiling or loading, and validation)",
            "time": format_time(timing.seconds) + spread,
            "timed": facts["protocol"],
            "speed": f"{facts['tflops']:.4g} TFLOPS, {facts['gigabytes_per_second']:,.4g} GB/s",
            "checked": f"{len(facts['requests_checked'])} of {case.batch} requests against float64",
            "relative error": f"{facts['relative_error']:.2e} (bound {facts['relative_error_bound']:.0e})",
            "lse error": f"{facts['lse_error']:.2e} (bound {facts['lse_error_bound']:.0e})",
            "verdict": "passed" if facts["passed"] else "FAILED: an error is above its bound",
        },
    )
