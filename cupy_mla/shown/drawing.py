"""What all pictures share: colours, figures, axes. matplotlib comes with the extra ``plot`` and is imported late."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any kind of colour blindness can tell apart; yellow, too light for a line,
# is left out.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK = "#333333"
FAINT = "#B8B8B8"

_DOTS_PER_INCH = 150
_SUFFIXES = ((1 << 20, "M"), (1 << 10, "K"))
_TICKS_BY_SPAN = (
    (5.0, (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0)),
    (30.0, (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)),
    (1e3, (1.0, 2.0, 5.0)),
)


def make_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches that belongs to no window.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "plot", "drawing pictures") from error
    return Figure(figsize=(width, height), layout="constrained")


def png_of(figure: Figure) -> bytes:
    """The content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH)
    return buffer.getvalue()


def tidy(axes: Axes, grid: str = "both") -> None:
    """A light grid behind the data, and no frame above and to the right of it."""
    axes.set_axisbelow(True)
    axes.grid(visible=True, axis=grid, color=FAINT, alpha=0.5, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def legend_beside(axes: Axes, handles: Sequence[Artist]) -> None:
    """A legend to the right of the axes, where it covers nothing."""
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, frameon=False)


def token_ticks(axis: Any, counts: Sequence[int]) -> None:
    """Ticks of a logarithmic axis at these numbers of tokens, written like 8K."""
    axis.set_ticks(counts, [format_tokens(count) for count in counts])
    axis.set_minor_locator(_no_ticks())


def plain_ticks(axis: Any) -> None:
    """Ticks of a logarithmic axis as numbers, not as powers of ten; the more within a decade, the fewer it spans."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    low, high = axis.get_view_interval()
    subs = next((subs for span, subs in _TICKS_BY_SPAN if high / low < span), (1.0,))
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(_no_ticks())


def format_tokens(count: int) -> str:
    """For example 8K for 8192, and 1000 for 1000."""
    for size, suffix in _SUFFIXES:
        if count >= size and count % size == 0:
            return f"{count // size}{suffix}"
    return str(count)


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()
