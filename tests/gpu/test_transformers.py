"""Models of transformers that are enabled, on the GPU: beside their own attention, and a step in a CUDA graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from small_models import TOLERANCE, VOCABULARY, error, generate, make_model, prompts  # noqa: E402

from cupy_mla.engines import transformers_attention as attention  # noqa: E402
from cupy_mla.engines.transformers import disable, enable  # noqa: E402

LENGTHS = [300, 9, 190]  # of the prompts, which are padded to the longest
MAX_TOKENS = 400


def on_gpu(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: array.to("cuda") for name, array in arrays.items()}


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("kind", ["deepseek_v3", "mistral4", "glm4_moe_lite", "deepseek_v32"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_generates_the_same(kind: str, cache: str | None, dtype: Any) -> None:
    model, inputs = make_model(kind, dtype).to("cuda"), on_gpu(prompts(LENGTHS))
    options = {"cache_implementation": cache, "disable_compile": True}
    expected = generate(model, inputs, **options)
    enable(model)
    actual = generate(model, inputs, **options)
    same = torch.ones(len(LENGTHS), dtype=torch.bool, device="cuda")
    for ours, theirs in zip(actual.logits, expected.logits, strict=True):
        assert error(ours[same], theirs[same]) < (TOLERANCE if dtype == torch.float16 else 2e-2)
        same &= ours.argmax(-1) == theirs.argmax(-1)
    assert same.any()


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("heads", [4, 128])
def test_a_step_in_a_graph(new: int, heads: int) -> None:
    """The mask is that of all tokens to come, as nothing can be read back in a graph."""
    model = make_model(attn="sdpa", num_attention_heads=heads, num_key_value_heads=heads).to("cuda")
    inputs = on_gpu(prompts(LENGTHS))
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, MAX_TOKENS - max(LENGTHS)), value=1)
    drafts = torch.randint(1, VOCABULARY, (4, len(LENGTHS), new), device="cuda")
    token = drafts[0].clone()
    enable(model)
    cache = transformers.StaticCache(config=model.config, max_cache_len=MAX_TOKENS)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        eager = copy.deepcopy(cache)
        # Kernels are compiled and loaded before a graph is captured, by a step of the same shape.
        seen = mask[:, : max(LENGTHS) + new]
        assert attention.visible_ranges(len(LENGTHS), seen.shape[1], seen.bool(), "cuda") is not None
        model(token, attention_mask=seen, past_key_values=copy.deepcopy(cache))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(token, attention_mask=mask, past_key_values=cache).logits
        disable(model)
        for draft in drafts:
            token.copy_(draft)
            graph.replay()
            expected = model(draft, attention_mask=mask, past_key_values=eager).logits
            assert error(logits, expected) < TOLERANCE
