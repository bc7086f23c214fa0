"""A model with random weights generates with its own attention and with ours: tokens, logits, time and memory.

The model is made on the spot, nothing is downloaded: a few layers of a kind of transformers, with the attention of its
default configuration and small dense layers beside it. First it generates from prompts of unlike lengths, with eager
attention in float32 as the reference; then steps over caches of random latents are timed, with the model's own
attention and with ours, and in a CUDA graph. Without a Hopper GPU a smaller model runs on the CPU, in NumPy.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cupy_mla.commands.command import Command
from cupy_mla.gpu.device import why_unsupported

KINDS = ("deepseek_v3", "deepseek_v2", "glm4_moe_lite", "youtu", "axk1", "mistral4")
OURS = "cupy_mla"
PAD = 0
PROMPTS = (200, 131, 5)  # tokens
# What a kind needs to have no experts: which of them are chosen may change with the last bit.
SMALL = {"hidden_size": 1024, "intermediate_size": 512, "vocab_size": 1024, "pad_token_id": PAD, "n_routed_experts": 8,
         "num_local_experts": 8, "moe_intermediate_size": 64, "num_experts_per_tok": 2, "n_group": 1,
         "topk_group": 1}  # fmt: skip
ON_CPU = {"hidden_size": 128, "intermediate_size": 128, "q_lora_rank": 64, "num_attention_heads": 8,
          "num_key_value_heads": 8}  # fmt: skip
WARM_UP = 3


def make_model(torch: Any, kind: str, layers: int, device: str) -> Any:
    """A model of random weights in bfloat16."""
    import transformers

    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    model_class = next(getattr(module, name) for name in module.__all__ if name.endswith("ForCausalLM"))
    dense = {"first_k_dense_replace": layers, "mlp_layer_types": ["dense"] * layers}
    sizes = {**SMALL, **dense, "num_hidden_layers": layers, **(ON_CPU if device == "cpu" else {})}
    config = transformers.CONFIG_MAPPING[kind](**sizes)
    config.num_key_value_heads = config.num_attention_heads
    torch.manual_seed(0)
    with torch.device(device):
        return model_class._from_config(config, dtype=torch.bfloat16, attn_implementation="eager").eval()


def cache_name(model: Any) -> str:
    """What a model calls its cache; it depends on the version of transformers."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def compare(torch: Any, model: Any, steps: int) -> dict[str, float]:
    """Tokens that agree with float32's, and the largest error of the logits of a step, of eager attention and ours."""
    from cupy_mla.engines.transformers import disable, enable

    device, longest = model.device, max(PROMPTS)
    mask = torch.stack([(torch.arange(longest) >= longest - length).long() for length in PROMPTS]).to(device)
    ids = torch.randint(1, 1000, mask.shape, device=device).where(mask.bool(), PAD)
    options = {"max_new_tokens": steps, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    reference = copy.deepcopy(model).float()
    tokens = reference.generate(ids, attention_mask=mask, **options).sequences

    def logits(model: Any) -> Any:
        """Of each step, [steps, prompts, vocabulary], after the reference's tokens."""
        past, found, seen = None, [], mask
        for step in range(steps):
            given = ids if past is None else tokens[:, longest + step - 1, None]
            output = model(given, attention_mask=seen, **{cache_name(model): past})
            past, seen = output[cache_name(model)], torch.nn.functional.pad(seen, (0, 1), value=1)
            found.append(output.logits[:, -1].float())
        return torch.stack(found)

    def against(expected: Any, actual: Any) -> tuple[float, float]:
        errors = (actual - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
        return float(errors.max()), float((actual.argmax(-1) == expected.argmax(-1)).float().mean())

    exact, eager = logits(reference), logits(model)
    enable(model)
    ours = logits(model)
    same = float((model.generate(ids, attention_mask=mask, **options).sequences == tokens).float().mean())
    disable(model)
    return {
        "error of the logits, eager in bfloat16": against(exact, eager)[0],
        "error of the logits, ours in bfloat16": against(exact, ours)[0],
        "share of tokens as in float32, eager": against(exact, eager)[1],
        "share of tokens as in float32, ours": against(exact, ours)[1],
        "share of tokens that generate() gives as in float32, ours": same,
    }


def filled_cache(torch: Any, model: Any, batch: int, length: int, static: bool, room: int) -> Any:
    """A cache of random latents of ``length`` tokens for each request."""
    import transformers

    from cupy_mla.engines.transformers_cache import has_room

    config, enabled = model.config, model.config._attn_implementation.startswith(OURS)
    if static:
        cache = transformers.StaticCache(config=config, max_cache_len=length + room)
    else:
        cache = transformers.DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        if enabled:
            has_room(cache, layer)
        latent, rope = (
            torch.randn(batch, 1, length, width, device=model.device, dtype=torch.bfloat16)
            for width in (config.kv_lora_rank, config.qk_rope_head_dim)
        )
        cache.update(latent, rope, layer)
    return cache


def time_steps(torch: Any, model: Any, batch: int, length: int, steps: int, in_graph: bool) -> tuple[float, float]:
    """Milliseconds of a step, and the most memory that was in use, in GB."""
    cuda = model.device.type == "cuda"
    cache = filled_cache(torch, model, batch, length, static=in_graph, room=2 * WARM_UP + steps + 1)
    token = torch.full((batch, 1), 7, device=model.device)
    if cuda:
        torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        model(token, **{cache_name(model): cache})

    run: Callable[[], None] = step
    wait: Callable[[], None] = torch.cuda.synchronize if cuda else lambda: None
    for _ in range(WARM_UP):
        step()
    if in_graph:
        wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run = graph.replay
        for _ in range(WARM_UP):
            run()
    wait()
    begin = time.perf_counter()
    for _ in range(steps):
        run()
    wait()
    seconds = time.perf_counter() - begin
    return seconds / steps * 1e3, torch.cuda.max_memory_allocated() / 1e9 if cuda else float("nan")


def time_all(torch: Any, model: Any, batch: int, length: int, steps: int) -> None:
    """Print a line for each kind of attention."""
    from cupy_mla.engines.transformers import disable, enable

    cuda = model.device.type == "cuda"
    runs = [("eager", False), ("sdpa", False), *([("sdpa", True)] if cuda else []), (OURS, False)]
    for name, in_graph in [*runs, *([(OURS, True)] if cuda else [])]:
        if name == OURS:
            enable(model)
        else:
            model.set_attn_implementation(name)
        label = f"{name}, CUDA graph" if in_graph else name
        try:
            milliseconds, memory = time_steps(torch, model, batch, length, steps, in_graph)
            click.echo(f"{batch:5d} x {length:6d} {label:>22} {milliseconds:10.3f} ms {memory:8.2f} GB")
        except torch.OutOfMemoryError:
            click.echo(f"{batch:5d} x {length:6d} {label:>22}  out of memory")
        finally:
            disable(model)
            if cuda:
                torch.cuda.empty_cache()


def read_sizes(context: click.Context, parameter: click.Parameter, text: str) -> list[tuple[int, int]]:
    try:
        return [(int(batch), int(length)) for batch, length in (size.split("x") for size in text.split(","))]
    except ValueError:
        raise click.BadParameter("expected sizes such as 16x4096,1x32768") from None


@click.command(cls=Command)
@click.option("--kind", type=click.Choice(KINDS), default=KINDS[0], show_default=True, help="Kind of model.")
@click.option("--layers", type=click.IntRange(min=1), default=2, show_default=True, help="Layers of the model.")
@click.option("--steps", type=click.IntRange(min=2), default=20, show_default=True, help="New tokens of each prompt.")
@click.option(
    "--sizes", callback=read_sizes, default="2x300", show_default=True, help="What to time: requests x tokens of each."
)
def main(kind: str, layers: int, steps: int, sizes: list[tuple[int, int]]) -> None:
    """Print tokens and logits of a model beside ours, then milliseconds of a step of each kind of attention."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise click.ClickException("this needs torch and transformers") from error
    transformers.logging.set_verbosity_error()
    reason = why_unsupported()
    if reason is not None:
        click.echo(f"on the CPU: {reason}", err=True)
    model = make_model(torch, kind, layers, "cpu" if reason is not None else "cuda")
    click.echo(
        f"{kind}, {layers} layers, {model.config.num_attention_heads} heads; transformers {transformers.__version__}, "
        f"torch {torch.__version__}"
    )
    with torch.no_grad():
        for name, value in compare(torch, model, steps).items():
            click.echo(f"{name:>60} {value:8.4f}")
        for batch, length in sizes:
            time_all(torch, model, batch, length, steps)


if __name__ == "__main__":
    main()
