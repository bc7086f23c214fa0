"""Bytes of the KV cache: what a token and a request take with each kind of attention, by arithmetic alone.

The cache of a token, in values per layer:

- MHA, GQA, MQA: KV heads x (width of a key + width of a value), with all query heads, some, or one as KV heads;
- MLA: the latent vector and the part of the key with the position, once for all heads.

A request takes its length times that; a paged cache rounds the length up to whole pages (63 tokens more at most with
the default page), which is not counted here. Scales of FP8 that are one for a whole cache are not counted either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import InvalidArgumentError
from ..layouts import BF16, DENSE_LAYOUTS, FP8_E4M3, LAYOUTS
from ..schedule.pieces import ceil_div
from .presets import GROUPED_PRESETS, PRESETS, GroupedPreset, ModelPreset

GQA_HEADS = 8  # KV heads of the usual grouped-query model, for models "as if" they had it
BF16_BITS, FP8_BITS = 16, 8
# DeepSeek-V2 (arXiv:2405.04434), section 3.2.3: the cache that was deployed, values quantised to 6 bits on average.
DEPLOYED_BITS = 6


@dataclass(frozen=True, slots=True)
class CacheSize:
    """The cache of one model with one kind of attention in one layout.

    Attributes
    ----------
    model
        Name of the preset.
    attention
        ``MLA``, ``MHA``, ``GQA-8`` (with the number of KV heads) or ``MQA``.
    own
        Whether the model has this attention; otherwise it is what it would take with the same heads and widths.
    layout
        Name of a cache layout: ``bf16``, ``fp8_e4m3``, or one that only MLA has.
    bytes_per_token
        Of all layers, on one rank.
    share_of_mha
        Of what the whole model would take as MHA in bf16.
    """

    model: str
    attention: str
    own: bool
    layout: str
    bytes_per_token: int
    share_of_mha: float

    def bytes_per_request(self, length: int) -> int:
        """Bytes of ``length`` tokens."""
        return length * self.bytes_per_token


def cache_sizes(model: ModelPreset | GroupedPreset, tensor_parallel: int = 1) -> list[CacheSize]:
    """The cache of a model with its own attention, then with what it might have instead.

    Parameters
    ----------
    model
        Which one.
    tensor_parallel
        Ranks that share the query heads; the sizes are of one rank. KV heads are divided among the ranks and repeated
        when there are more ranks than heads; the latent vector of MLA is on every rank whole.

    Raises
    ------
    InvalidArgumentError
        Fewer than 1 rank.
    """
    if tensor_parallel < 1:
        raise InvalidArgumentError("tp", "at least 1", str(tensor_parallel))
    mha = model.num_layers * BF16.token_bytes(*_head_widths(model), model.num_heads_q)

    def size(attention: str, own: bool, layout: str, bytes_per_layer: int) -> CacheSize:
        total = model.num_layers * bytes_per_layer
        return CacheSize(model.name, attention, own, layout, total, total / mha)

    sizes = []
    if isinstance(model, ModelPreset):
        widths = model.latent_dim, model.rope_dim
        quantised = (layout for layout in LAYOUTS.values() if layout not in DENSE_LAYOUTS.values())
        for layout in (BF16, *quantised):
            if layout.supports(*widths):
                sizes.append(size("MLA", True, layout.name, layout.token_bytes(*widths)))
    for name, heads, own in _by_head(model):
        on_rank = ceil_div(heads, tensor_parallel)
        for layout in (BF16, FP8_E4M3):
            sizes.append(size(name, own, layout.name, layout.token_bytes(*_head_widths(model), on_rank)))
    return sizes


def _head_widths(model: ModelPreset | GroupedPreset) -> tuple[int, int]:
    """Width of a head's key and of its value."""
    if isinstance(model, ModelPreset):
        return model.nope_dim + model.rope_dim, model.value_dim
    return model.head_dim, model.head_dim


def _by_head(model: ModelPreset | GroupedPreset) -> Iterator[tuple[str, int, bool]]:
    """Kinds of attention that cache by head: name, KV heads, and whether the model has it; its own first."""
    own = model.num_heads_kv if isinstance(model, GroupedPreset) else None
    names = {model.num_heads_q: "MHA", GQA_HEADS: f"GQA-{GQA_HEADS}", 1: "MQA"}
    if own is not None:
        names = {own: names.get(own, f"GQA-{own}"), **names}
    for heads, name in names.items():
        if heads <= model.num_heads_q:
            yield name, heads, heads == own


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two caches side by side.

    Attributes
    ----------
    question
        What is compared.
    other, mla
        How each is reckoned, as text.
    other_bits, mla_bits
        Bits of a token, all layers.
    """

    question: str
    other: str
    other_bits: int
    mla: str
    mla_bits: int

    @property
    def factor(self) -> float:
        """How many times larger the other is."""
        return self.other_bits / self.mla_bits

    @property
    def percent_saved(self) -> float:
        """By how much the cache shrinks; negative when it grows."""
        return 100.0 * (1.0 - self.mla_bits / self.other_bits)


def compare_claim() -> list[Comparison]:
    """What DeepSeek-V2's MLA saves, by what it is compared with and at how many bits. The first is the paper's."""
    mla, old = PRESETS["deepseek-v2"], GROUPED_PRESETS["deepseek-67b"]
    key, value = _head_widths(mla)

    def latent(bits: int) -> tuple[str, int]:
        width = mla.latent_dim + mla.rope_dim
        return f"{mla.num_layers} x {width} x {bits} bits", mla.num_layers * width * bits

    def heads_of_mla(heads: int) -> tuple[str, int]:
        text = f"{mla.num_layers} x {heads} x ({key} + {value}) x {BF16_BITS} bits"
        return text, mla.num_layers * heads * (key + value) * BF16_BITS

    before = (
        f"{old.num_layers} x {old.num_heads_kv} x ({old.head_dim} + {old.head_dim}) x {BF16_BITS} bits",
        old.num_layers * old.num_heads_kv * 2 * old.head_dim * BF16_BITS,
    )
    pairs = (
        (f"DeepSeek 67B (GQA-8, bf16) to V2 as deployed ({DEPLOYED_BITS} bits)", before, latent(DEPLOYED_BITS)),
        ("DeepSeek 67B (GQA-8, bf16) to V2 in fp8", before, latent(FP8_BITS)),
        ("DeepSeek 67B (GQA-8, bf16) to V2 in bf16", before, latent(BF16_BITS)),
        ("V2 as if MHA to V2, both bf16", heads_of_mla(mla.num_heads_q), latent(BF16_BITS)),
        ("V2 as if GQA-8 to V2, both bf16", heads_of_mla(GQA_HEADS), latent(BF16_BITS)),
        ("V2 as if MQA to V2, both bf16", heads_of_mla(1), latent(BF16_BITS)),
    )
    return [Comparison(question, *other, *ours) for question, other, ours in pairs]


CLAIM = "MLA needs 1/15 of the memory at 32K and compresses 93.3%"


def explain_claim() -> str:
    """What is true of the claim, in words with the numbers of `compare_claim`."""
    paper, _, same_bits, mha, gqa, mqa = compare_claim()
    mla = PRESETS["deepseek-v2"]
    groups = (mla.latent_dim + mla.rope_dim) / (mla.nope_dim + mla.value_dim)
    return "\n".join(
        (
            "- It is one number said twice (1 - 1/15 = 93.3%), and it is not MLA's alone. The paper on DeepSeek-V2 "
            "compares with DeepSeek 67B, an older model with more layers and GQA of 8 heads, and deploys V2 with a "
            f"cache of {DEPLOYED_BITS} bits per value on average. It prints no arithmetic; only with these bits "
            f"against the {BF16_BITS} of the older one do its figures give {paper.percent_saved:.1f}%: "
            f"{paper.other_bits:,} to {paper.mla_bits:,} bits a token, {paper.factor:.1f} times.",
            f"- At equal bits, attention and layers save {same_bits.percent_saved:.1f}% ({same_bits.factor:.1f} "
            f"times); the other factor of {BF16_BITS / DEPLOYED_BITS:.1f} is quantisation, which GQA can have too.",
            f"- Within one model at equal bits, MLA takes 1/{mha.factor:.0f} of MHA ({mha.percent_saved:.1f}% less), "
            f"1/{gqa.factor:.1f} of GQA-8 ({gqa.percent_saved:.1f}% less), and {1 / mqa.factor:.1f} times MQA. With "
            f"keys of {mla.nope_dim} values instead of {mla.nope_dim + mla.rope_dim}, as in the paper's table, it "
            f"equals GQA with {groups:.2f} heads.",
            "- 32K has no part in it: every cache grows in proportion to the length, so a ratio is the same at any.",
            "- Tensor parallelism divides KV heads among the ranks, not the latent vector: on each of 8 ranks that "
            f"serve the same requests, MLA takes {GQA_HEADS / gqa.factor:.1f} times what GQA-8 does (see --tp).",
        )
    )
