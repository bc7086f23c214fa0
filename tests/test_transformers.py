"""Models of transformers that are enabled, beside the same models as they are: small, of random weights, on NumPy."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from small_models import (  # noqa: E402
    HEADS,
    MODELS,
    SPARSE_MODELS,
    STEPS,
    TOLERANCE,
    VOCABULARY,
    error,
    generate,
    make_model,
    prompts,
)

from cupy_mla import InvalidArgumentError  # noqa: E402
from cupy_mla.engines import transformers_attention as attention  # noqa: E402
from cupy_mla.engines.transformers import disable, enable  # noqa: E402
from cupy_mla.engines.transformers_cache import ROOM, RoomyDynamicLayer, RoomyStaticLayer, row_tokens  # noqa: E402


def layers_of(output: Any) -> list[Any]:
    return list((output["cache"] if "cache" in output else output["past_key_values"]).layers)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the queries of each layer that the kernels attended to."""
    seen: list[tuple[int, ...]] = []
    absorbed_queries = attention.absorbed_queries

    def counted(module: Any, query: Any) -> Any:
        seen.append(tuple(query.shape))
        return absorbed_queries(module, query)

    monkeypatch.setattr(attention, "absorbed_queries", counted)
    return seen


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("kind", [*MODELS, *SPARSE_MODELS])
def test_generates_the_same(kind: str, cache: str | None, steps: list[Any]) -> None:
    model = make_model(kind)
    inputs = prompts([70, 9, 66])
    expected = generate(model, inputs, cache_implementation=cache)
    enable(model)
    actual = generate(model, inputs, cache_implementation=cache)
    same = torch.ones(3, dtype=torch.bool)  # prompts whose tokens were the same up to here
    for step, (ours, theirs) in enumerate(zip(actual.logits, expected.logits, strict=True)):
        assert error(ours[same], theirs[same]) < TOLERANCE, f"step {step}"
        same &= ours.argmax(-1) == theirs.argmax(-1)
    # Two tokens may be as likely as each other but for the last bit: then logits are as close, and what follows is not.
    assert actual.sequences[same].equal(expected.sequences[same])
    assert same.sum() >= 2
    layers = sum(hasattr(module, attention.SERVED) for module in model.modules())
    if kind in SPARSE_MODELS and cache == "static":
        assert steps.pop(0)[2] == 70  # the prompt is short
        steps = steps[layers - 1 :]
    assert steps == [(3, HEADS, 1, 96)] * layers * STEPS  # the first token comes of the prompt
    if kind in MODELS or cache is None:
        roomy = RoomyStaticLayer if cache else RoomyDynamicLayer
        assert sum(isinstance(layer, roomy) for layer in layers_of(actual)) == layers >= 1


def test_bfloat16_beside_float32(steps: list[Any]) -> None:
    model = make_model(dtype=torch.bfloat16)
    oracle = copy.deepcopy(model).float()
    inputs = prompts([130, 2])
    expected = generate(oracle, inputs)
    enable(model)
    cache, seen = None, inputs["attention_mask"]
    for step, token in enumerate(expected.sequences[:, 130:].unbind(1)):  # as its own tokens may be others
        given = inputs["input_ids"] if cache is None else expected.sequences[:, 129 + step, None]
        with torch.no_grad():
            output = model(given, attention_mask=seen, past_key_values=cache)
        logits, cache = output.logits[:, -1], output.past_key_values
        assert error(logits, expected.logits[step]) < 2e-2
        assert token.shape == (2,)
        seen = torch.nn.functional.pad(seen, (0, 1), value=1)
    assert len(steps) == 2 * STEPS


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_prompts_run_as_before(attn: str, steps: list[Any]) -> None:
    model, inputs = make_model(attn=attn), prompts([20, 5])
    with torch.no_grad():
        expected = model(**inputs).logits
        enable(model)
        assert model(**inputs).logits.equal(expected)
        assert model(**inputs, use_cache=False).logits.equal(expected)
    assert not steps


def test_disable_undoes_it(steps: list[Any]) -> None:
    model = make_model()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    enable(model)
    enable(model)  # a second time changes nothing
    assert model.config._attn_implementation == "cupy_mla+eager"
    disable(model)
    disable(model)
    assert model.config._attn_implementation == "eager"
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not any(module._forward_pre_hooks for module in model.modules())
    generate(model, prompts([5]))
    assert not steps


@pytest.mark.parametrize("new", [2, 5, 128, 129])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_several_new_tokens(new: int, cache: str, steps: list[Any]) -> None:
    model, inputs = make_model(), prompts([40, 31])
    more = torch.randint(1, VOCABULARY, (2, new), generator=torch.Generator().manual_seed(2))
    seen = torch.nn.functional.pad(inputs["attention_mask"], (0, new), value=1)

    def run() -> Any:
        caches = {"dynamic": transformers.DynamicCache, "static": transformers.StaticCache}
        past = caches[cache](config=model.config, **({"max_cache_len": 200} if cache == "static" else {}))
        with torch.no_grad():
            model(**inputs, past_key_values=past)
            return model(more, attention_mask=seen, past_key_values=past).logits

    expected = run()
    enable(model)
    assert error(run(), expected) < TOLERANCE
    assert len(steps) == (2 if new <= attention.MAX_NEW_TOKENS else 0)


@pytest.mark.parametrize(
    ("attn", "new", "topk"), [("eager", 1, 24), ("sdpa", 3, 5), ("eager", 3, 24), ("sdpa", 2, 500)]
)
def test_sparse_attention(attn: str, new: int, topk: int, steps: list[Any]) -> None:
    """Chosen tokens are copied, or all of them where they are fewer; what the mask hides is not seen though chosen."""
    model, inputs = make_model("deepseek_v32", attn=attn, index_topk=topk), prompts([40, 3])
    more = torch.randint(1, VOCABULARY, (2, new), generator=torch.Generator().manual_seed(2))
    seen = torch.nn.functional.pad(inputs["attention_mask"], (0, new), value=1)

    def run() -> tuple[Any, Any]:
        with torch.no_grad():
            output = model(**inputs)
            return output.logits, model(more, attention_mask=seen, past_key_values=output.past_key_values).logits

    prompt, expected = run()
    enable(model)
    ours, actual = run()
    assert error(ours, prompt) < 1e-3  # by the former attention, with a mask made here
    assert error(actual, expected) < TOLERANCE
    assert len(steps) == 1


def test_another_attention_may_be_set(steps: list[Any]) -> None:
    model, inputs = make_model(), prompts([12])
    expected = generate(model, inputs)
    enable(model)
    model.set_attn_implementation("eager")
    assert all(map(torch.equal, generate(model, inputs).logits, expected.logits))
    assert not steps
    enable(model)
    generate(model, inputs)
    assert steps


def test_padding_on_the_right_runs_as_before(steps: list[Any]) -> None:
    model, inputs = make_model(), prompts([12, 12])
    inputs["attention_mask"][1, 7:] = 0
    expected = generate(model, inputs)
    enable(model)
    actual = generate(model, inputs)
    assert all(map(torch.equal, actual.logits, expected.logits))
    assert not steps


def test_masks_of_users_run_as_before(steps: list[Any]) -> None:
    model, inputs = make_model(), prompts([12])
    mask = torch.zeros(1, 1, 2, 14, dtype=torch.float16)
    mask[..., 3] = torch.finfo(torch.float16).min

    def run() -> Any:
        with torch.no_grad():
            past = model(**inputs).past_key_values
            return model(torch.tensor([[3, 4]]), attention_mask=mask, past_key_values=past).logits

    expected = run()
    enable(model)
    assert run().equal(expected)
    assert not steps


def test_gradients_flow_as_before(steps: list[Any]) -> None:
    model, inputs = make_model(dtype=torch.bfloat16), prompts([12])
    enable(model)
    with torch.no_grad():
        past = model(**inputs).past_key_values
    model(torch.tensor([[3]]), past_key_values=past).logits.sum().backward()
    assert model.model.layers[0].self_attn.kv_b_proj.weight.grad.abs().sum() > 0
    assert not steps


def test_a_cache_that_was_filled_before_is_copied(steps: list[Any]) -> None:
    model, inputs = make_model(), prompts([70, 64])
    seen = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    with torch.no_grad():
        past = model(**inputs).past_key_values
        other = copy.deepcopy(past)
        expected = model(torch.tensor([[3], [4]]), attention_mask=seen, past_key_values=past).logits
        enable(model)
        actual = model(torch.tensor([[3], [4]]), attention_mask=seen, past_key_values=other).logits
    assert error(actual, expected) < TOLERANCE
    assert len(steps) == 2
    assert not any(isinstance(layer, RoomyDynamicLayer) for layer in other.layers)


def test_a_growing_layer_copies_rarely() -> None:
    layer = RoomyDynamicLayer()
    whole = torch.randn(2, 1, 1000, 8)
    addresses = set()
    for begin, end in [(0, 3), (3, 64), *((at, at + 1) for at in range(64, 1000))]:
        keys, values = layer.update(whole[:, :, begin:end], whole[:, :, begin:end, :4])
        addresses.add(keys.data_ptr())
        assert keys.equal(whole[:, :, :end])
        assert values.equal(whole[:, :, :end, :4])
        assert row_tokens(keys) >= end + ROOM
    assert len(addresses) < 8
    assert layer.get_seq_length() == 1000


def test_what_is_done_to_a_growing_layer() -> None:
    """Taking tokens back, choosing and repeating requests, as beam search and speculative decoding do."""
    ours, theirs = RoomyDynamicLayer(), transformers.cache_utils.DynamicLayer()

    def both(change: Any) -> None:
        for layer in (ours, theirs):
            change(layer)
        assert ours.keys.equal(theirs.keys)
        assert ours.get_seq_length() == theirs.get_seq_length()

    def append(count: int) -> Any:
        new = torch.randn(ours.keys.shape[0] if ours.is_initialized else 2, 1, count, 8)
        return lambda layer: layer.update(new, new)

    both(append(7))
    both(lambda layer: layer.crop(-2))
    both(append(3))
    both(lambda layer: layer.reorder_cache(torch.tensor([1, 1])))
    both(append(1))
    both(lambda layer: layer.batch_repeat_interleave(2))
    both(append(2))
    both(lambda layer: layer.batch_select_indices(torch.tensor([0, 3])))
    both(append(1))
    ours.reset()
    theirs.reset()
    both(append(5))


def test_beam_search(steps: list[Any]) -> None:
    model, inputs = make_model(), prompts([20, 11])
    expected = generate(model, inputs, num_beams=3)
    enable(model)
    assert generate(model, inputs, num_beams=3).sequences.equal(expected.sequences)
    assert steps == [(6, HEADS, 1, 96)] * 2 * STEPS


def test_drafted_tokens(steps: list[Any]) -> None:
    model, drafter, inputs = make_model(), make_model(), prompts([20])
    expected = generate(model, inputs)
    enable(model)
    assert generate(model, inputs, assistant_model=drafter).sequences.equal(expected.sequences)
    assert any(shape[2] > 1 for shape in steps)


def test_a_static_cache_that_is_full(steps: list[Any]) -> None:
    model, inputs = make_model(), prompts([63, 1])
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    enable(model)
    seen = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        actual = model(torch.tensor([[3], [4]]), attention_mask=seen, past_key_values=cache).logits
        disable(model)
        whole = torch.cat([inputs["input_ids"], torch.tensor([[3], [4]])], dim=1)
        expected = model(whole, attention_mask=seen).logits[:, -1:]
    assert cache.get_max_length() == 64
    assert error(actual, expected) < TOLERANCE
    assert len(steps) == 2


def test_inside_torch_compile() -> None:
    importlib.import_module("cupy_mla.torch_rules")  # as it is where functions of ours were traced before
    model, inputs = make_model(attn="sdpa"), prompts([20, 11])
    enable(model)
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    seen = inputs["attention_mask"]
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        other = copy.deepcopy(cache)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for token in ([[3], [4]], [[5], [6]], [[7], [8]]):
            seen = torch.nn.functional.pad(seen, (0, 1), value=1)
            mask = attention.visible_ranges(2, seen.shape[1], seen.bool(), "cpu")
            positions = (seen.cumsum(1) - 1)[:, -1:]
            given = {"attention_mask": mask, "position_ids": positions}
            expected = model(torch.tensor(token), past_key_values=other, **given).logits
            actual = compiled(torch.tensor(token), past_key_values=cache, **given).logits
            assert error(actual, expected) < TOLERANCE


# --- what is refused


def refused(model: Any) -> str:
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    with pytest.raises(InvalidArgumentError) as caught:
        enable(model)
    assert getattr(getattr(model, "config", None), "_attn_implementation", None) == before
    assert caught.value.argument == "model"
    return str(caught.value)


def test_models_without_a_latent_are_refused() -> None:
    config = transformers.LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8,
                                      intermediate_size=32)  # fmt: skip
    assert "LlamaForCausalLM" in refused(transformers.LlamaForCausalLM(config))
    assert "expected a model of transformers, got str" in refused("deepseek-ai/DeepSeek-V3")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kv_lora_rank": 100}, "100"),
        ({"qk_rope_head_dim": 32}, "32"),
        ({"dtype": torch.float32}, "torch.float32"),
    ],
)
def test_what_the_kernels_lack_is_named(change: dict[str, Any], reason: str) -> None:
    assert reason in refused(make_model(**change))


def test_other_kinds_of_sparse_attention_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("deepseek_v32")
    monkeypatch.setattr(type(model.config), "model_type", "another")
    assert "its sparse attention is not of the kind of deepseek_v32" in refused(model)


def test_weights_that_are_not_plain_are_refused() -> None:
    model = make_model()
    attention_module = model.model.layers[1].self_attn
    attention_module.kv_b_proj = torch.nn.Sequential(attention_module.kv_b_proj)
    assert "kv_b_proj is a Sequential" in refused(model)
    assert "meta" in refused(make_model().to("meta"))
