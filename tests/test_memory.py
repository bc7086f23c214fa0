"""The arithmetic of the KV cache, against figures worked out by hand, and the command that prints it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from cupy_mla.cli import main
from cupy_mla.errors import InvalidArgumentError
from cupy_mla.lab.cache_sizes import CLAIM, CacheSize, cache_sizes, compare_claim, explain_claim
from cupy_mla.lab.presets import GROUPED_PRESETS, PRESETS, find_model, find_preset
from cupy_mla.shown import tables


def size_of(model: str, attention: str, layout: str = "bf16", tensor_parallel: int = 1) -> CacheSize:
    sizes = cache_sizes(find_model(model), tensor_parallel)
    (size,) = [size for size in sizes if (size.attention, size.layout) == (attention, layout)]
    return size


@pytest.mark.parametrize(
    ("model", "attention", "layout", "expected"),
    [
        ("deepseek-v3", "MLA", "bf16", 61 * 1152),
        ("deepseek-v3", "MLA", "fp8_e4m3", 61 * 576),
        ("deepseek-v3", "MLA", "fp8_ds_mla", 61 * 656),
        ("deepseek-v3", "MHA", "bf16", 61 * 128 * (192 + 128) * 2),
        ("deepseek-v3", "GQA-8", "fp8_e4m3", 61 * 8 * 320),
        ("deepseek-v3", "MQA", "bf16", 61 * 320 * 2),
        ("deepseek-v2", "MLA", "bf16", 69_120),
        ("deepseek-v2-lite", "MLA", "bf16", 27 * 1152),
        ("deepseek-v2-lite", "MHA", "bf16", 27 * 16 * 320 * 2),
        ("kimi-k2", "MHA", "bf16", 61 * 64 * 320 * 2),
        ("deepseek-67b", "GQA-8", "bf16", 95 * 8 * 256 * 2),
        ("llama-3.1-8b", "GQA-8", "bf16", 128 << 10),
        ("llama-3.1-405b", "GQA-8", "bf16", 126 * 8 * 256 * 2),
        ("llama-2-7b", "MHA", "fp8_e4m3", 32 * 32 * 256),
        ("falcon-7b", "MQA", "bf16", 32 * 128 * 2),
    ],
)
def test_bytes_per_token(model: str, attention: str, layout: str, expected: int) -> None:
    size = size_of(model, attention, layout)
    assert size.bytes_per_token == expected
    assert size.bytes_per_request(32768) == 32768 * expected
    mha = size_of(model, "MHA")
    assert size.share_of_mha == expected / mha.bytes_per_token


@pytest.mark.parametrize("name", [*PRESETS, *GROUPED_PRESETS])
def test_every_model_has_its_own_attention_first(name: str) -> None:
    sizes = cache_sizes(find_model(name))
    own = [size.own for size in sizes]
    assert own[0]
    assert own == sorted(own, reverse=True)
    assert len({(size.attention, size.layout) for size in sizes}) == len(sizes)
    assert {"MHA", "GQA-8", "MQA"} <= {size.attention for size in sizes}
    assert ("MLA" in {size.attention for size in sizes}) == (name in PRESETS)


def test_ranks_divide_heads_but_not_the_latent_vector() -> None:
    one, eight, thirty_two = (
        {kind: size_of("deepseek-v3", kind, tensor_parallel=ranks).bytes_per_token for kind in ("MLA", "GQA-8", "MHA")}
        for ranks in (1, 8, 32)
    )
    assert one["MLA"] == eight["MLA"] == thirty_two["MLA"]
    assert one["GQA-8"] == 8 * eight["GQA-8"] == 8 * thirty_two["GQA-8"]  # 32 ranks repeat the 8 heads
    assert one["MHA"] == 8 * eight["MHA"] == 32 * thirty_two["MHA"]
    with pytest.raises(InvalidArgumentError, match="tp: expected at least 1, got 0"):
        cache_sizes(find_preset("deepseek-v3"), 0)


def test_the_claim_is_the_paper_s_comparison_and_no_other() -> None:
    paper, *others = compare_claim()
    assert round(paper.percent_saved, 1) == 93.3
    assert round(paper.factor) == 15
    assert all(round(other.percent_saved, 1) != 93.3 and round(other.factor) != 15 for other in others)
    # The texts of the sides are the arithmetic.
    for comparison in (paper, *others):
        for text, bits in ((comparison.other, comparison.other_bits), (comparison.mla, comparison.mla_bits)):
            assert eval(text.replace("x", "*").removesuffix(" bits")) == bits


def test_the_claim_agrees_with_the_table() -> None:
    by_question = {comparison.question: comparison for comparison in compare_claim()}
    mla = size_of("deepseek-v2", "MLA").bytes_per_token
    for attention in ("MHA", "GQA-8", "MQA"):
        comparison = by_question[f"V2 as if {attention} to V2, both bf16"]
        assert comparison.factor == size_of("deepseek-v2", attention).bytes_per_token / mla
    older = by_question["DeepSeek 67B (GQA-8, bf16) to V2 in bf16"]
    assert older.factor == size_of("deepseek-67b", "GQA-8").bytes_per_token / mla


def test_the_explanation_gives_the_numbers() -> None:
    text = explain_claim()
    for number in ("93.3%", "82.2%", "6 bits", "1/71 of MHA", "1/4.4 of GQA-8", "1.8 times MQA", "2.25 heads"):
        assert number in text


def run(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["memory", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_command_prints_table_and_claim() -> None:
    output = run()
    for model in (*PRESETS, *GROUPED_PRESETS):
        assert model in output
    lines = [line.split() for line in output.splitlines()]
    assert ["deepseek-v3", "MLA", "bf16", "70,272", "0.268", "2.145", "8.578", "1.41"] in lines
    assert ["llama-3.1-70b", "GQA-8", "bf16", "327,680", "1.250", "10.000", "40.000", "12.5"] in lines
    assert CLAIM in output
    assert "15.01" in output
    assert max(map(len, output.splitlines())) <= 160


def test_command_takes_models_lengths_and_ranks() -> None:
    output = run("--model", "llama-3.1-8b", "--length", "65536", "--length", "65536", "--tp", "4")
    assert "on each of 4 ranks" in output
    assert "deepseek-v3 " not in output
    lines = [line.split() for line in output.splitlines()]
    assert ["llama-3.1-8b", "GQA-8", "bf16", "32,768", "2.000", "6.25"] in lines
    assert ["(MHA)", "bf16", "131,072", "8.000", "25"] in lines


def test_command_prints_json() -> None:
    values = json.loads(run("--model", "deepseek-v2", "--length", "1000", "--json"))
    first = values["rows"][0]
    assert (first["attention"], first["own"], first["bytes_per_token"]) == ("MLA", True, 69_120)
    assert first["bytes_per_request"] == {"1000": 69_120_000}
    assert len(values["rows"]) == 9
    assert round(values["claim"]["comparisons"][0]["percent_saved"], 1) == 93.3
    assert values["claim"]["claim"] == CLAIM


CONFIGS: dict[str, tuple[dict[str, object], str, int]] = {
    "V3.2": (
        {"num_hidden_layers": 61, "num_attention_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
        | {"qk_nope_head_dim": 128, "v_head_dim": 128, "num_key_value_heads": 128},
        "MLA",
        61 * 1152,
    ),
    "Llama": (
        {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096},
        "GQA-8",
        128 << 10,
    ),
    "head_dim": (
        {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 100, "head_dim": 256},
        "MHA",
        2 * 4 * 512 * 2,
    ),
    "of several parts": (
        {"vision_config": {}, "text_config": {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 256}},
        "MHA",
        3 * 4 * 128 * 2,
    ),
    "GPT-2": ({"n_layer": 12, "n_head": 12, "n_embd": 768}, "MHA", 12 * 768 * 2 * 2),
    "Falcon": ({"n_layer": 32, "num_attention_heads": 71, "hidden_size": 4544, "multi_query": True}, "MQA", 8192),
}


@pytest.mark.parametrize(("config", "attention", "expected"), CONFIGS.values(), ids=CONFIGS)
def test_configurations_of_models(config: dict[str, object], attention: str, expected: int, tmp_path: Path) -> None:
    folder = tmp_path / "some-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for path in (folder, folder / "config.json"):
        first = json.loads(run("--config", str(path), "--json"))["rows"][0]
        assert (first["model"], first["attention"], first["own"]) == ("some-model", attention, True)
        assert (first["layout"], first["bytes_per_token"]) == ("bf16", expected)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "a file that can be read"),
        ("{", "a JSON file"),
        ("[1]", "a JSON object"),
        ("{}", "a file with num_hidden_layers"),
        ('{"num_hidden_layers": 2, "num_attention_heads": "many"}', "num_attention_heads as an integer"),
        ('{"num_hidden_layers": 2, "num_attention_heads": 4}', "a file with hidden_size"),
    ],
)
def test_a_configuration_that_does_not_do_is_refused(text: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    result = CliRunner().invoke(main, ["memory", "--config", str(path)])
    assert result.exit_code == 2
    assert f"--config: expected {words}" in result.output


def test_the_claim_is_not_every_model_s() -> None:
    assert CLAIM not in run("--model", "mistral-7b")


def test_nothing_is_cut_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (80, 60):
        monkeypatch.setattr(tables, "_console", lambda width, columns=columns: Console(width=columns))
        output = run("--model", "deepseek-v3")
        for number in ("4,997,120", "70,272", "610.000", "0.703", "fp8_ds_mla", "(GQA-8)"):
            assert number in output
        assert max(map(len, output.splitlines())) <= columns


def test_unknown_models_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"model: expected one of deepseek-v3.*llama-2-7b.*got 'gpt-2'"):
        find_model("gpt-2")
    result = CliRunner().invoke(main, ["memory", "--model", "gpt-2"])
    assert result.exit_code == 2
    assert "llama-3.1-8b" in result.output
    # A decode takes MLA models only.
    with pytest.raises(InvalidArgumentError, match="preset"):
        find_preset("llama-3.1-8b")
