"""The trials of what writes, copies and converts caches: every bit of a cache, also those that nobody writes."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays.dtypes import numpy_dtype
from ..cache.append import append_tokens
from ..cache.convert import dequantise_cache, quantise_cache
from ..cache.copy_pages import copy_pages
from ..layouts import FP4_V41, FP8_DS_MLA, FP8_DS_MLA_NO_ROPE, FP8_E4M3, FP8_MODEL1, FP8_V41, CacheLayout
from .trial import Array, Trial

E4M3_TYPE = "float8_e4m3fn"
E4M3_FACTOR = 8.0  # of stored values, which are then scaled by its inverse
# Of fewer than 16 bits, by latent and rope width.
CODED_LAYOUTS = {
    (512, 64): (FP8_E4M3, FP8_DS_MLA),
    (512, 0): (FP8_E4M3, FP8_DS_MLA_NO_ROPE, FP8_MODEL1, FP8_V41, FP4_V41),
    (256, 64): (FP8_E4M3,),
}
_INT32 = np.iinfo(np.int32)
_STRAY_CHANCE = 0.2


def appends(trial: Trial) -> None:
    """`append_tokens`: rows as they are, or rounded to a layout of fewer bits."""
    rng, settings = trial.rng, trial.settings
    coded = _Coded(trial) if trial.chance(0.5) else None
    num_pages, num_tokens = trial.up_to(8), trial.up_to(40) - 1
    kv_heads = trial.pick(1, 1, 2) if coded is None else coded.kv_heads
    dtype = settings.dtype if coded is not None else trial.pick(settings.dtype, E4M3_TYPE)
    shape = num_pages, settings.page_size, kv_heads, settings.width
    before, rows = trial.values(shape, dtype), trial.values((num_tokens, *shape[2:]), dtype)
    slots = rng.permutation(num_pages * settings.page_size)[:num_tokens].astype(np.int64)
    rows, after = rows[: slots.size], before.copy()
    stray = rng.random(slots.size) < _STRAY_CHANCE
    slots[stray] = rng.choice([-1, num_pages * settings.page_size, 2**40, -(2**40)], int(stray.sum()))
    for row, slot in zip(rows, slots, strict=True):
        if 0 <= slot < num_pages * settings.page_size:
            after[slot // settings.page_size, slot % settings.page_size] = row
    trial.words |= {"shape": shape, "dtype": dtype, "tokens": int(slots.size), "stray": int(stray.sum())}
    if coded is None:
        cache, expected = trial.maybe_pair(trial.stored(before)), after
        options, new = {}, trial.maybe_pair(np.ascontiguousarray(rows))
    else:
        cache, expected = coded.pair(trial, coded.quantised(before)), coded.quantised(after)
        options, new = coded.options(trial), coded.pair(trial, np.ascontiguousarray(rows), needed=cache)
    uploaded = trial.upload(cache)
    places: dict[str, Any] = {"slot_mapping": trial.upload(slots)}
    if trial.chance(0.5):  # pages of one request, one behind the other; what is no token is past its row
        places = {
            "block_table": trial.upload(np.arange(num_pages, dtype=np.int32)[None]),
            "positions": trial.upload(np.clip(slots, _INT32.min, _INT32.max).astype(np.int32)),
            "requests": trial.upload(np.zeros(slots.size, np.int32)),
        }
    append_tokens(uploaded, trial.upload(new), **places, **options)
    trial.compare_equal("cache", _whole(trial, uploaded), expected)


def page_copies(trial: Trial) -> None:
    """`copy_pages`: within a cache, gathered from another one, or scattered to it."""
    rng, settings = trial.rng, trial.settings
    dtype = trial.pick(settings.dtype, E4M3_TYPE, "uint8")
    token = trial.pick(1, 1, 2), trial.pick(settings.width, settings.width, 24, 7)
    within, num_pages, others = trial.chance(0.5), trial.up_to(12), trial.up_to(12)
    most = num_pages // 2 if within else min(num_pages, others)
    count = int(rng.integers(0, most + 1))
    order = rng.permutation(num_pages).astype(np.int32)
    targets, sources = order[:count].copy(), order[num_pages - count :].copy()
    page = settings.page_size, *token
    before = _bytes_of(trial, (num_pages, *page), dtype)
    source = before if within else _bytes_of(trial, (others, *page), dtype)
    if not within:
        sources = rng.integers(0, others, count, dtype=np.int32)
    for numbers in (targets, sources):
        stray = rng.random(count) < _STRAY_CHANCE
        numbers[stray] = rng.choice(np.array([-1, 99, _INT32.min, _INT32.max], np.int32), int(stray.sum()))
    after, limit = before.copy(), num_pages if within else others
    for new, old in zip(targets, sources, strict=True):
        if 0 <= new < num_pages and 0 <= old < limit:
            after[new] = source[old]
    trial.words |= {"dtype": dtype, "pages": num_pages, "others": None if within else others, "page": page}
    trial.words |= {"targets": targets.tolist(), "sources": sources.tolist()}
    cache = trial.upload(trial.stored(before))
    given = None if within else trial.upload(trial.stored(source))
    copy_pages(cache, trial.upload(sources), trial.upload(targets), source=given, validate=False)
    trial.compare_equal("cache", _whole(trial, cache), after)


def conversions(trial: Trial) -> None:
    """`quantise_cache` and `dequantise_cache`: all pages or chosen ones, there and back."""
    rng, settings, coded = trial.rng, trial.settings, _Coded(trial)
    num_pages, chosen = trial.up_to(6), trial.chance(0.6)
    page = settings.page_size, coded.kv_heads, settings.width
    before = trial.values((num_pages, *page), settings.dtype)
    pages = np.arange(num_pages, dtype=np.int32)
    if chosen:
        pages = rng.permutation(num_pages)[: int(rng.integers(0, num_pages + 1))].astype(np.int32)
        stray = rng.random(pages.size) < _STRAY_CHANCE
        pages[stray] = rng.choice(np.array([-1, num_pages, _INT32.max], np.int32), int(stray.sum()))
    kept = (pages >= 0) & (pages < num_pages)
    values, after = trial.values((pages.size, *page), settings.dtype, 2.0), before.copy()
    after[pages[kept]] = values[kept]
    trial.words |= {"pages": pages.tolist() if chosen else None, "page": page}
    options = coded.options(trial) | {"pages": trial.upload(pages) if chosen else None, "validate": False}
    cache = coded.pair(trial, coded.quantised(before))
    given = coded.pair(trial, values, needed=cache)
    uploaded = trial.upload(cache)
    quantise_cache(uploaded, trial.upload(given), **options)
    stored = coded.quantised(after)
    trial.compare_equal("cache", _whole(trial, uploaded), stored)

    exact = coded.dequantised(stored)
    expected = np.array(values)
    expected[kept] = exact[pages[kept]].astype(expected.dtype)
    back = trial.upload(coded.pair(trial, np.array(values), needed=cache))
    dequantise_cache(uploaded, back, **options)
    trial.compare_equal("values", _whole(trial, back), expected)


class _Coded:
    """A drawn layout of fewer than 16 bits a value, with what its stored values are multiplied by."""

    def __init__(self, trial: Trial) -> None:
        settings = trial.settings
        self.layout: CacheLayout = trial.pick(*CODED_LAYOUTS[settings.latent_dim, settings.rope_dim])
        self.kv_heads = trial.pick(1, 2) if self.layout is FP8_E4M3 else 1
        self.scales: tuple[float, ...] = ()
        if self.layout.needs_scale:
            each = settings.rope_dim > 0 and trial.chance(0.5)
            self.scales = (1 / E4M3_FACTOR, 0.3 / E4M3_FACTOR) if each else (1 / E4M3_FACTOR,)
        self._columns = (slice(settings.latent_dim), slice(settings.latent_dim, None))
        trial.words |= {"layout": self.layout.name, "scales": self.scales}

    def quantised(self, values: Array) -> Array:
        """The cache that the layout makes of pages of values."""
        if len(self.scales) > 1:
            parts = zip(self._columns, self.scales, strict=True)
            return np.concatenate([self.layout.quantise(values[..., part], scale) for part, scale in parts], axis=-1)
        return self.layout.with_page_starts(self.layout.quantise(values, *self.scales))

    def dequantised(self, stored: Array) -> Array:
        """Its values in float32."""
        if len(self.scales) > 1:
            parts = zip(self._columns, self.scales, strict=True)
            return np.concatenate([self.layout.dequantise(stored[..., part], scale) for part, scale in parts], axis=-1)
        return self.layout.dequantise(stored, *self.scales)

    def pair(self, trial: Trial, array: Array, needed: Any = None) -> Any:
        """An array as the layout may have it: e4m3 and its rows perhaps in two parts, and certainly so where each part
        has a scale and the other side, ``needed``, is packed."""
        if self.layout is FP8_E4M3 and len(self.scales) > 1 and isinstance(needed, np.ndarray):
            latent, rope = (trial.stored(array[..., part]) for part in self._columns)
            return latent, rope
        if self.layout is FP8_E4M3:
            return trial.maybe_pair(trial.stored(array))
        return array

    def options(self, trial: Trial) -> dict[str, Any]:
        """Layout and scale, the latter as numbers or in an array."""
        scale: Any = None
        if self.scales:
            number = trial.chance(0.5)
            scale = self.scales if number else trial.upload(np.array(self.scales, np.float32))
            scale = scale[0] if number and len(self.scales) == 1 else scale
        return {"layout": self.layout.name, "kv_scale": scale}


def _bytes_of(trial: Trial, shape: tuple[int, ...], dtype: str) -> Array:
    """Any bits, as elements of a type."""
    itemsize = numpy_dtype(dtype).itemsize
    return trial.rng.integers(0, 256, (*shape[:-1], shape[-1] * itemsize), np.uint8).view(numpy_dtype(dtype))


def _whole(trial: Trial, array: Any) -> Array:
    """An array, or the two parts of one side by side, on the host."""
    parts = [trial.download(part) for part in (array if isinstance(array, tuple) else (array,))]
    return np.concatenate([np.ascontiguousarray(part) for part in parts], axis=-1)
