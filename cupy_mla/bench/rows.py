"""What was measured of one case: a row."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .ceilings import Ceilings
from .grid import BenchCase

OURS = "cupy-mla"


@dataclass(slots=True)
class Measurement:
    """One implementation on one case.

    Attributes
    ----------
    us, fastest_us, slowest_us
        Microseconds of a call: median, least and most of the replays. None when it was not timed.
    sustained_us
        Microseconds of a call, back to back over a time long enough for the GPU's power limit to act.
    error
        Relative Frobenius error of the worst of the requests compared with float64.
    failure
        Why it gave no result, or a wrong one; None when all is well.
    skipped
        Why it was not tried (a peer does not support the case).
    """

    us: float | None = None
    fastest_us: float | None = None
    slowest_us: float | None = None
    sustained_us: float | None = None
    error: float | None = None
    failure: str | None = None
    skipped: str | None = None


@dataclass(slots=True)
class Row:
    """All implementations on one case.

    Attributes
    ----------
    case
        What was timed.
    ours
        This package.
    peers
        The others by name, in the order they were asked for.
    calls, copies
        Calls in a CUDA graph (1 on the CPU), and copies of the cache that they read in turn.
    """

    case: BenchCase
    ours: Measurement = field(default_factory=Measurement)
    peers: dict[str, Measurement] = field(default_factory=dict)
    calls: int = 0
    copies: int = 0

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def failure(self) -> str | None:
        """Why our side of it failed."""
        return self.ours.failure

    @property
    def measurements(self) -> dict[str, Measurement]:
        """Ours first, then the peers, by name."""
        return {OURS: self.ours, **self.peers}

    def ratio(self, peer: str) -> float | None:
        """A peer's time over ours; above 1 we are faster. None when one of them has no time."""
        other = self.peers.get(peer)
        return None if other is None else _quotient(other.us, self.ours.us)

    def sustained_ratio(self, peer: str) -> float | None:
        """The same of the sustained times."""
        other = self.peers.get(peer)
        return None if other is None else _quotient(other.sustained_us, self.ours.sustained_us)

    @property
    def best_peer(self) -> str | None:
        """The fastest peer."""
        times = {name: peer.us for name, peer in self.peers.items() if peer.us is not None}
        return min(times, key=times.__getitem__) if times else None

    @property
    def best_ratio(self) -> float | None:
        """The fastest peer's time over ours."""
        return None if self.best_peer is None else self.ratio(self.best_peer)

    def tflops(self, name: str = OURS) -> float | None:
        """10^12 floating-point operations per second, by the model of ``work.Work``."""
        return _quotient(self.case.work.flops / 1e6, self.measurements[name].us)

    def gigabytes_per_second(self, name: str = OURS) -> float | None:
        """10^9 bytes per second, by the model of ``work.Work``."""
        return _quotient(self.case.work.bytes / 1e3, self.measurements[name].us)

    def share(self, ceilings: Ceilings, name: str = OURS) -> float | None:
        """The least time that the ceilings allow (the roofline) over the time taken: 1 is as fast as can be."""
        return _quotient(ceilings.least_seconds(self.case.work) * 1e6, self.measurements[name].us)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the derived figures beside the measured ones; `from_dict` reads it."""
        work = self.case.work
        return {
            "name": self.name,
            "case": self.case.as_dict(),
            "flops": work.flops,
            "bytes": work.bytes,
            "calls": self.calls,
            "copies": self.copies,
            "ours": {**asdict(self.ours), "tflops": self.tflops(), "gigabytes_per_second": self.gigabytes_per_second()},
            "peers": {name: {**asdict(peer), "ratio": self.ratio(name)} for name, peer in self.peers.items()},
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """A row as `as_dict` wrote it."""
        return cls(
            case=BenchCase.from_dict(values["case"]),
            ours=_measurement(values["ours"]),
            peers={name: _measurement(peer) for name, peer in values["peers"].items()},
            calls=values["calls"],
            copies=values["copies"],
        )


def _measurement(values: dict[str, Any]) -> Measurement:
    return Measurement(**{name: values[name] for name in Measurement.__slots__})


def _quotient(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below
