"""Benchmarks: GPU time of decodes by a stated protocol, beside other implementations, as tables, files and pictures."""

from ..lab.timing import Timing
from .ceilings import Ceilings, measure_ceilings
from .grid import BenchCase, expand_grid
from .own_call import time_call
from .results import Change, Results, compare, load_results
from .rows import Measurement, Row
from .run import run_bench

__all__ = [
    "BenchCase",
    "Ceilings",
    "Change",
    "Measurement",
    "Results",
    "Row",
    "Timing",
    "compare",
    "expand_grid",
    "load_results",
    "measure_ceilings",
    "run_bench",
    "time_call",
]
