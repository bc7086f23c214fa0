"""Where the host's time of one eager decode call goes, in microseconds; the GPU's time is not in it.

Calls are queued back to back, 200 at a time, and waited for in between; reported are the median of 25 rounds and the
fastest. The shape is small, so that the GPU keeps up. Beside ours, for scale: a bare launch of an empty kernel through
CuPy, and FlashMLA where it can be imported (or is packed in the vLLM wheel's folder given by --peers).

Without a Hopper GPU the same code runs with CPU tensors that are taken for CUDA tensors and a driver that returns at
once: the figures are then our own share, without the driver's.
"""

from __future__ import annotations

import importlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cupy_mla import mla_decode, plan_decode
from cupy_mla.arrays import scratch
from cupy_mla.arrays import view as views
from cupy_mla.call.describe import describe_decode
from cupy_mla.call.options import ARRAYS, DECODE, OPTIONS, read_call
from cupy_mla.call.problem import Addresses
from cupy_mla.commands.command import Command
from cupy_mla.decode import blueprint, plan, torch_calls
from cupy_mla.decode import dense as decode
from cupy_mla.decode.blueprint import CallMemory
from cupy_mla.gpu import device, driver
from cupy_mla.gpu.device import DeviceInfo, why_unsupported
from cupy_mla.lab.files import to_json, write_text
from cupy_mla.settings import get_settings

CALLS, ROUNDS = 200, 25  # two launches a call stay below the 1024 that a stream takes before it blocks
WARM_UP_CALLS = 20  # what is made again and again takes less time
WARM_UP_SECONDS = 1.0  # before the first round: a CPU that was idle has low clocks for a while
BATCH, LENGTH, HEADS, PAGE_SIZE = 4, 1024, 16, 64
HEAD_DIM, LATENT_DIM = 576, 512
FULL_CALL = "mla_decode, plan and outputs given"
FULL_OPERATOR = "torch.ops, plan and outputs given"
TARGET_MICROSECONDS = {FULL_OPERATOR: 25.0, FULL_CALL: 14.5}  # on an H200 machine, launches and all
EMPTY_KERNEL = 'extern "C" __global__ void empty(const void* a, const void* b, void* c, int n) {}'


@dataclass(frozen=True)
class Cost:
    """Microseconds of one call: the middle and the fastest round."""

    name: str
    median: float
    fastest: float


def measure(name: str, function: Callable[[], object], wait: Callable[[], object]) -> Cost:
    for _ in range(CALLS):
        function()
    wait()
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(CALLS):
            function()
        times.append((time.perf_counter() - begin) / CALLS * 1e6)
        wait()
    return Cost(name, statistics.median(times), min(times))


def warm_up(function: Callable[[], object], wait: Callable[[], object]) -> None:
    begin = time.perf_counter()
    while time.perf_counter() - begin < WARM_UP_SECONDS:
        function()
        wait()


class NoGpu:
    """Takes the place of a GPU: the driver's functions return at once, CPU tensors pass for CUDA tensors."""

    def __init__(self, torch: Any) -> None:
        class Anything:
            def __getattr__(self, name: str) -> Any:
                return 0

        driver._driver = SimpleNamespace(
            CUlaunchConfig=SimpleNamespace,
            CUlaunchAttribute=lambda: SimpleNamespace(value=SimpleNamespace(clusterDim=SimpleNamespace())),
            CUlaunchAttributeID=Anything(),
            CUtensorMapDataType=Anything(),
            CUtensorMapInterleave=Anything(),
            CUtensorMapSwizzle=Anything(),
            CUtensorMapL2promotion=Anything(),
            CUtensorMapFloatOOBfill=Anything(),
            CUfunction=int,
            CUstream=int,
            cuuint64_t=int,
            cuuint32_t=int,
            cuStreamIsCapturing=lambda stream: (0, 0),
            cuLaunchKernelEx=lambda config, function, pointers, extra: (0,),
            cuTensorMapEncodeTiled=lambda *description: (0, SimpleNamespace(opaque=[0] * 16)),
        )
        read = views._read_torch

        def read_as_cuda(tensor: Any, name: str, stream: int | None) -> views.ArrayView:
            view = read(tensor, name, stream)
            view.device = views.CUDA
            return view

        views._READER_OF_FRAMEWORK["torch"] = read_as_cuda
        torch._C._cuda_getCurrentRawStream = lambda device_id: 0
        torch._C._cuda_getDevice = lambda: 0
        scratch.is_captured = lambda stream: False  # type: ignore[attr-defined]
        torch._C._cuda_cudaCachingAllocator_raw_alloc = lambda size, stream: 1 << 40
        torch._C._cuda_cudaCachingAllocator_raw_delete = lambda pointer: None
        info = DeviceInfo(0, "none", (9, 0), 132, 2**37, 2**25, 232448)
        for module in (plan, decode, torch_calls):
            module.current_stream = lambda array, device_id: 0  # type: ignore[attr-defined]
        plan.describe_device = lambda device_id: info  # type: ignore[attr-defined]
        blueprint.load = lambda source, device_id: SimpleNamespace(handle=1, device_id=0)  # type: ignore[attr-defined]
        device.require_supported = lambda device_id: info  # type: ignore[attr-defined]


class Inputs:
    """Arrays of a small decode step: torch's, or CuPy's where torch is not installed."""

    def __init__(self, torch: Any, device: str) -> None:
        columns = LENGTH // PAGE_SIZE
        shapes = {"q": (BATCH, 1, HEADS, HEAD_DIM), "kv_cache": (BATCH * columns, PAGE_SIZE, 1, HEAD_DIM)}
        outputs = {"out": ((BATCH, 1, HEADS, LATENT_DIM), "float16"), "lse": ((BATCH, HEADS, 1), "float32")}
        if torch is None:
            import cupy as xp

            options: dict[str, Any] = {}
        else:
            xp = torch
            options = {"device": device}
        table = xp.arange(BATCH * columns, dtype=xp.int32, **options).reshape(BATCH, columns)
        self.inputs = {
            **{name: xp.zeros(shape, dtype=xp.float16, **options) for name, shape in shapes.items()},
            "block_table": table,
            "cache_seqlens": xp.full((BATCH,), LENGTH, dtype=xp.int32, **options),
        }
        self.outputs = {
            name: xp.zeros(shape, dtype=getattr(xp, dtype), **options) for name, (shape, dtype) in outputs.items()
        }


def whole_calls(given: Inputs, torch: Any) -> dict[str, Callable[[], object]]:
    """What users call."""
    inputs, outputs = given.inputs, given.outputs
    made = plan_decode(**inputs)
    q, kv_cache, table, lengths = inputs.values()
    out, lse = outputs.values()
    q_pair, kv_pair = ((array[..., :LATENT_DIM], array[..., LATENT_DIM:]) for array in (q, kv_cache))
    calls: dict[str, Callable[[], object]] = {
        FULL_CALL: lambda: mla_decode(q, kv_cache, table, lengths, plan=made, out=out, lse=lse),
        "the same, (latent, rope) pairs": lambda: mla_decode(
            q_pair, kv_pair, table, lengths, plan=made, out=out, lse=lse
        ),
        "mla_decode, plan given": lambda: mla_decode(q, kv_cache, table, lengths, plan=made),
        "mla_decode": lambda: mla_decode(q, kv_cache, table, lengths),
        "plan.update": lambda: made.update(lengths),
    }
    if torch is not None:
        importlib.import_module("cupy_mla.torch_ops")
        operators = torch.ops.cupy_mla
        plan_tensor = operators.plan_decode(**inputs)
        calls[FULL_OPERATOR] = lambda: operators.mla_decode_out(
            q, kv_cache, table, lengths, plan=plan_tensor, out=out, lse=lse
        )
        calls["torch.ops, plan given"] = lambda: operators.mla_decode(q, kv_cache, table, lengths, plan=plan_tensor)
        calls["torch.ops"] = lambda: operators.mla_decode(q, kv_cache, table, lengths)
    return calls


def parts(arrays: Inputs) -> dict[str, Callable[[], object]]:
    """The steps of the first of `whole_calls`, one by one, as it runs for a call seen before."""
    inputs, outputs = arrays.inputs, arrays.outputs
    made = plan_decode(**inputs)
    for _ in range(WARM_UP_CALLS):
        mla_decode(**inputs, plan=made, **outputs)
    given = tuple({**inputs, **outputs}.get(name) for name in ARRAYS)
    # mla_decode hands on a layout, and what says of a shard, only where there is one.
    rare = ("layout", "cp_world", "cp_rank", "cp_interleave")
    options = tuple(option.default for option in OPTIONS if DECODE in option.functions and option.name not in rare)

    settings = get_settings()

    def find() -> Any:
        return decode._known.find(given, options, made.blueprint, settings)

    _, pointers, (call, q_rope, kv_rope) = find()
    named = Addresses(*pointers)
    addresses = named._replace(q_rope=named.q_latent + q_rope, kv_rope=named.kv_latent + kv_rope)
    stream = decode.current_stream(inputs["q"], 0)
    decode_launch, combine_launch = call._decode, call._combine

    class Packed:
        """The launch left out."""

        addresses = decode_launch.addresses

        def __call__(self, stream: int) -> None:
            return None

    kind = made.blueprint

    def pack() -> None:
        call(addresses, made, stream)

    def without_launches(function: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            call._decode = call._combine = Packed()
            try:
                function()
            finally:
                call._decode, call._combine = decode_launch, combine_launch

        return run

    return {
        "call recognised, addresses checked": find,
        "current stream": lambda: decode.current_stream(inputs["q"], 0),
        "tensor maps looked up": lambda: call._maps.get((addresses.kv_latent, addresses.kv_rope)),
        "tensor maps and arguments packed (includes it)": without_launches(pack),
        "launch 1 (decode)": lambda: decode_launch(stream),
        **({} if combine_launch is None else {"launch 2 (merge)": lambda: combine_launch(stream)}),
        "memory of a call without a plan object (not in it)": lambda: CallMemory(
            kind, inputs["q"], made.pointer, 0, 0, stream
        ),
        "addresses and forms of arrays, if not the call before": lambda: decode._known._sketches.sketch(given, options),
    }


def first_time_parts(given: Inputs) -> dict[str, Callable[[], object]]:
    """What a call of a kind not seen before costs besides."""
    inputs, outputs = given.inputs, given.outputs
    made = plan_decode(**inputs)
    named = {**inputs, **outputs}
    problem, described = describe_decode(*read_call(**inputs))
    return {
        "views of six arrays": lambda: [views.view(array, name) for name, array in named.items()],
        "checked and described (includes five views)": lambda: describe_decode(*read_call(**inputs)),
        "plan checked": lambda: made.check(problem, described.location),
    }


def for_scale(given: Inputs, torch: Any, peers: str | None) -> dict[str, Callable[[], object]]:
    """What else a launch can cost."""
    import cupy

    kernel = cupy.RawKernel(EMPTY_KERNEL, "empty")
    buffers = [cupy.zeros(8, cupy.float32) for _ in range(3)]
    calls: dict[str, Callable[[], object]] = {
        "an empty kernel through cupy.RawKernel": lambda: kernel((1,), (32,), (*buffers, 7))
    }
    peer = None if torch is None else import_flash_mla(peers)
    if peer is not None:
        inputs = {
            name: array.to(torch.bfloat16) if array.is_floating_point() else array
            for name, array in given.inputs.items()
        }
        metadata, _ = peer.get_mla_metadata()
        arguments = (*inputs.values(), LATENT_DIM, metadata)
        scale = HEAD_DIM**-0.5
        calls["FlashMLA (metadata given)"] = lambda: peer.flash_mla_with_kvcache(*arguments, softmax_scale=scale)
    return calls


def import_flash_mla(folder: str | None) -> Any:
    """FlashMLA's Python interface, or None."""
    if folder is not None:
        sys.path.insert(0, folder)
    for name in ("flash_mla", "vllm.third_party.flashmla.flash_mla_interface"):
        try:
            return importlib.import_module(name)
        except (ImportError, OSError):
            continue
    click.echo("FlashMLA cannot be imported: not timed.\n")
    return None


def import_torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError:
        return None


@click.command(help=__doc__, cls=Command)
@click.option("--peers", type=click.Path(exists=True, file_okay=False), help="Folder with FlashMLA, see above.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Also write the rows here.")
def main(peers: str | None, json_path: Path | None) -> None:
    torch = import_torch()
    reason = why_unsupported()
    if reason is not None and torch is None:
        raise click.ClickException(f"{reason}; without a GPU the host's share is timed on torch tensors: install torch")
    if reason is not None:
        click.echo(f"No GPU to launch on ({reason}): launches are left out, and so is what the driver costs.\n")
        NoGpu(torch)
    given = Inputs(torch, "cpu" if reason else "cuda")

    def wait() -> None:
        if reason is None:
            importlib.import_module("cupy").cuda.Device().synchronize()

    click.echo(f"Python {platform.python_version()}, {platform.processor() or platform.machine()}\n")
    whole = whole_calls(given, torch)
    groups = {"whole calls": whole, "of the first": parts(given), "only the first time": first_time_parts(given)}
    if reason is None:
        groups["for scale"] = for_scale(given, torch, peers)
    warm_up(whole[FULL_CALL], wait)
    rows: list[dict[str, Any]] = []
    click.echo(f"{'us of host time a call':<56}{'median':>9}{'fastest':>9}")
    for group, functions in groups.items():
        click.echo(group)
        for name, function in functions.items():
            cost = measure(name, function, wait)
            rows.append({"group": group, **asdict(cost)})
            click.echo(f"  {name:<54}{cost.median:>9.2f}{cost.fastest:>9.2f}")
    if json_path is not None:
        write_text(json_path, to_json(rows, indent=1) + "\n", "json")
    click.echo()
    for name, most in TARGET_MICROSECONDS.items():
        for row in rows:
            if row["name"] == name:
                click.echo(f"{name}: {row['median']:.2f} us, to be at most {most:.1f}")


if __name__ == "__main__":
    main()
