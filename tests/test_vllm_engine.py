"""The script that compares backends in vLLM's engine: its model is right by transformers, its counts on a stand-in."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

ROOT = Path(__file__).resolve().parent.parent
LENGTHS, NEW = [8, 20, 64, 65, 129, 300], 8


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import vllm_engine

    return vllm_engine


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_goes_on_with_what_repeats(dtype: str, script: Any, tmp_path: Path) -> None:
    """With its own attention, and in bfloat16 with ours."""
    transformers = pytest.importorskip("transformers")
    from cupy_mla.engines.transformers import enable

    folder = script.write_model(tmp_path / "model", 4, dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    if dtype == "bfloat16":
        enable(model)
    for prompt, following in zip(*script.make_prompts(LENGTHS, NEW), strict=True):
        tokens = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        assert tokens[0, len(prompt) :].tolist() == following


def test_right_tokens_are_far_ahead(script: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = script.write_model(tmp_path / "model", 4, "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt, following in zip(*script.make_prompts(LENGTHS, NEW), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + following])).logits[0, len(prompt) - 1 : -1]
        first, second = logits.topk(2).values.T
        assert (first - second > 0.2 * first).all()  # bfloat16 moves a logit by less than 0.01 of it


def test_no_prompt_has_special_tokens_or_says_it_all(script: Any) -> None:
    prompts, following = script.make_prompts(script.LENGTHS, NEW)
    assert [len(prompt) for prompt in prompts] == script.LENGTHS
    for prompt, right in zip(prompts, following, strict=True):
        assert min(prompt) >= 2
        assert len(right) == NEW
        assert len(set(prompt)) < len(prompt)  # something stands in it twice
        assert len(set(right)) > 3


class StandIn:
    """An engine that knows what is right, but for a first token of one request."""

    given: dict[str, Any]

    def __init__(self, **given: Any) -> None:
        type(self).given = given

    def generate(self, prompts: list[dict[str, list[int]]], params: Any, use_tqdm: bool) -> list[Any]:
        rows = [prompt["prompt_token_ids"] for prompt in prompts]
        following = self.script.make_prompts([len(row) for row in rows], params.max_tokens)[1]  # type: ignore[attr-defined]
        following[2][0] = 0
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=row)]) for row in following]

    def get_metrics(self) -> list[Any]:
        counts = {"vllm:spec_decode_num_draft_tokens": 9, "vllm:spec_decode_num_accepted_tokens": 7}
        return [SimpleNamespace(name=name, value=value) for name, value in counts.items()]


@pytest.fixture
def vllm(script: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = ModuleType("vllm")
    llm = type("LLM", (StandIn,), {"script": script})
    vars(module).update(LLM=llm, SamplingParams=SimpleNamespace, __version__="0")
    monkeypatch.setitem(sys.modules, "vllm", module)
    return llm


@pytest.mark.parametrize(("drafts", "ending"), [(0, "right"), (3, "right, 7 of 9 drafts accepted")])
def test_wrong_tokens_are_counted(drafts: int, ending: str, script: Any, vllm: Any, tmp_path: Path) -> None:
    engine = script.Engine("CUSTOM", "fp8", 4, drafts)
    assert script.generate(engine, tmp_path) == f"831 of 832 tokens {ending}"
    assert vllm.given["attention_backend"] == "CUSTOM"
    assert vllm.given["kv_cache_memory_bytes"] >= sum(script.LENGTHS) * script.WIDTH * 2
    sizes = vllm.given["compilation_config"]["cudagraph_capture_sizes"]
    assert sizes == [size * (1 + drafts) for size in (1, 2, 4, 8, 13)]


def test_each_backend_is_asked_for(script: Any, vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Forks of a process whose torch has threads already would wait for them; the script's own has none.
    monkeypatch.setattr(script, "in_a_process", lambda function, *arguments: function(*arguments))
    result = CliRunner().invoke(script.main, ["--backends", "FLASHMLA,CUSTOM", "--heads", "2"])
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert lines[1:] == [f"{backend} 831 of 832 tokens right" for backend in ("FLASHMLA", "CUSTOM")]


def test_it_says_what_it_needs(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    result = CliRunner().invoke(script.main, [])
    assert result.exit_code == 1
    assert "this needs vLLM" in result.output


@pytest.mark.parametrize("size", ["64", "64x", "ax8", "1x2x3"])
def test_sizes_are_read(size: str, script: Any) -> None:
    result = CliRunner().invoke(script.main, ["--size", size])
    assert result.exit_code == 2
    assert "expected requests x tokens of each" in result.output
