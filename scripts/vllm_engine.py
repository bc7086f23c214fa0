"""vLLM's engine generates with several attention backends: right tokens of each, and times of its steps.

Two models are made on the spot, nothing is downloaded. One goes on with what repeats (`repeating_model.py`), from
prompts of unlike lengths, so every backend's tokens are known beforehand. The other has DeepSeek V3's attention, small
dense layers beside it and vLLM's dummy weights; steps are timed while all requests decode. Each engine runs in a
process of its own, with CUDA graphs of whole steps and without torch.compile. This needs vLLM and a GPU.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from repeating_model import make_prompts, write_model

LENGTHS = [8, 20, 63, 64, 65, 100, 129, 200, 300, 512, 1000, 1500, 3900]  # of prompts, in tokens
NEW = 64  # tokens that follow each of these
PAGE_SIZE = 64
WIDTH, BYTES = 576, {"auto": 2, "fp8": 1}  # of a token in the cache, and of each of its values
LARGEST_BATCH = 16384  # tokens of a step with prompts
WARM_UP, STEPS, SPARE = 5, 80, 128  # steps that are timed, those before; tokens of a request beside its prompt
STAGGER = 8  # so that requests do not reach a new page at once
TIMED = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16",
    "vocab_size": 1024, "hidden_size": 2048, "intermediate_size": 2048, "kv_lora_rank": 512, "q_lora_rank": 1536,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "max_position_embeddings": 131072,
    "n_routed_experts": 8, "moe_intermediate_size": 256, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "attention_bias": False, "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True)
class Engine:
    """What an engine is made with."""

    backend: str
    kv_cache_dtype: str
    heads: int
    drafts: int

    def start(self, model: Path, requests: int, longest: int, layers: int, **others: Any) -> Any:
        """vLLM with a cache for so many requests of so many tokens."""
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # steps are asked for one by one
        from vllm import LLM

        pages = requests * (-(-longest // PAGE_SIZE) + 1)
        sizes = sorted({min(2**power, requests) for power in range(requests.bit_length() + 1)})
        graphs = {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [size * (1 + self.drafts) for size in sizes],
        }
        return LLM(
            model=str(model), skip_tokenizer_init=True, attention_backend=self.backend, compilation_config=graphs,
            kv_cache_dtype=self.kv_cache_dtype, max_model_len=longest, max_num_seqs=requests, disable_log_stats=False,
            max_num_batched_tokens=LARGEST_BATCH, enable_prefix_caching=False, gpu_memory_utilization=0.05,
            kv_cache_memory_bytes=pages * PAGE_SIZE * WIDTH * BYTES[self.kv_cache_dtype] * layers, **others,
        )  # fmt: skip


def generate(engine: Engine, folder: Path) -> str:
    """How many of the tokens that the engine gives are right."""
    from vllm import SamplingParams

    model = write_model(folder / "repeating", engine.heads)
    prompts, following = make_prompts(LENGTHS, NEW)
    others: dict[str, Any] = {}
    if engine.drafts:
        found_by = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 2}
        others["speculative_config"] = {**found_by, "num_speculative_tokens": engine.drafts}
    llm = engine.start(model, len(prompts), max(LENGTHS) + NEW + PAGE_SIZE, 2, **others)
    greedy = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    pairs = [pair for row, right in zip(tokens, following, strict=True) for pair in zip(row, right, strict=True)]
    text = f"{sum(token == right for token, right in pairs)} of {len(pairs)} tokens right"
    counts = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    if engine.drafts:
        accepted, drafted = (counts[f"vllm:spec_decode_num_{what}_tokens"] for what in ("accepted", "draft"))
        text += f", {accepted} of {drafted} drafts accepted"
    return text


def time_steps(engine: Engine, folder: Path, requests: int, length: int, layers: int) -> str:
    """Times of steps in which every request gets one token."""
    import torch
    from vllm import SamplingParams

    model = folder / f"timed-{engine.heads}-{layers}"
    model.mkdir(exist_ok=True)
    heads = {"num_attention_heads": engine.heads, "num_key_value_heads": engine.heads}
    config = {**TIMED, **heads, "num_hidden_layers": layers, "first_k_dense_replace": layers}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    longest = length + SPARE + PAGE_SIZE
    llm = replace(engine, drafts=0).start(model, requests, longest, layers, load_format="dummy")
    core = llm.llm_engine
    greedy = SamplingParams(temperature=0, max_tokens=SPARE, ignore_eos=True, detokenize=False)
    generator = torch.Generator().manual_seed(1)
    for request in range(requests):
        tokens = torch.randint(2, TIMED["vocab_size"], (length - STAGGER * (request % 16),), generator=generator)
        core.add_request(str(request), {"prompt_token_ids": tokens.tolist()}, greedy)
    made: dict[str, int] = {}

    def step() -> float:
        begin = time.perf_counter()
        for output in core.step():
            made[output.request_id] = len(output.outputs[0].token_ids)
        return time.perf_counter() - begin

    while len(made) < requests:
        step()
    for _ in range(WARM_UP):
        step()
    before = sum(made.values())
    seconds = [step() for _ in range(min(STEPS, SPARE - max(made.values()) - 2))]
    rate = (sum(made.values()) - before) / sum(seconds)
    return (
        f"{requests} x {length}, {layers} layers: {statistics.median(seconds) * 1e3:.2f} ms a step, {rate:.0f} tokens/s"
    )


def in_a_process(function: Any, *arguments: Any) -> str:
    """A forked one: it need not import vLLM again, and gives all its memory back."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return str(pool.submit(function, *arguments).result())


def read_size(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    try:
        batch, length = (int(number) for number in text.split("x"))
    except ValueError:
        raise click.BadParameter("expected requests x tokens of each, such as 64x8192") from None
    return batch, length


@click.command()
@click.option("--backends", default="FLASHMLA,CUSTOM", show_default=True, help="vLLM's names; CUSTOM is cupy-mla.")
@click.option(
    "--kv-cache-dtype", type=click.Choice(list(BYTES)), default="auto", show_default=True, help="The cache's."
)
@click.option("--heads", type=click.IntRange(min=1), default=16, show_default=True, help="Query heads.")
@click.option("--drafts", type=click.IntRange(min=0), default=0, show_default=True, help="Drafted tokens of a step.")
@click.option("--size", callback=read_size, help="Requests x tokens of each to time steps with, such as 64x8192.")
@click.option("--layers", type=click.IntRange(min=1), default=36, show_default=True, help="Layers of the timed model.")
def main(
    backends: str, kv_cache_dtype: str, heads: int, drafts: int, size: tuple[int, int] | None, layers: int
) -> None:
    """Print how many tokens of each backend are right, and with --size what a step takes."""
    os.environ.update(
        HF_HUB_OFFLINE="1", PYTORCH_NVML_BASED_CUDA_CHECK="1"
    )  # a fork may use CUDA if nothing did before
    try:
        import vllm
        from vllm import LLM as LLM  # all of it, before the forks
    except ImportError as error:
        raise click.ClickException("this needs vLLM") from error
    click.echo(f"vLLM {vllm.__version__}, {heads} heads, cache {kv_cache_dtype}")
    with tempfile.TemporaryDirectory() as name:
        for backend in backends.split(","):
            engine = Engine(backend, kv_cache_dtype, heads, drafts)
            click.echo(f"{backend:>16} {in_a_process(generate, engine, Path(name))}")
            if size is not None:
                click.echo(f"{backend:>16} {in_a_process(time_steps, engine, Path(name), *size, layers)}")


if __name__ == "__main__":
    main()
