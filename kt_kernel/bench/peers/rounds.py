"""The interleaved measurement: in each round our limits, then for each format of each peer ours and the peer, A B A B.

Ours and the peer of a pair get the same routing, drawn anew for every pair. All systems are loaded at once and only one
process runs at a time (`session.py`).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from . import compare, install
from .catalog import Format, System, ours
from .layer_data import LayerData
from .session import PeerError, WorkerProcess

CHECK_TOKENS = 4
# Forwards of one measurement by tokens: short ones are repeated.
REPEATS = ((8, 8), (64, 3), (1 << 30, 1))

Key = tuple[str, str, int]  # system, format, tokens


@dataclass(frozen=True)
class Sample:
    """One forward: its time, the bytes of its distinct experts, its operations, and the limits of its round."""

    seconds: float
    weight_bytes: float
    operations: float
    read: float
    peak: float

    @property
    def share_of_limit(self) -> float:
        """What the nearer limit allows over what it took."""
        return max(self.weight_bytes / self.read, self.operations / self.peak) / self.seconds


@dataclass
class Loaded:
    """A format that a system has loaded and computes right."""

    kind: Format
    expert_bytes: float
    checked: compare.Checked
    difference: float = 0.0
    difference_bound: float = 0.0


@dataclass
class Run:
    """What one thread count gave."""

    threads: int
    systems: dict[str, System] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    loaded: dict[str, dict[str, Loaded]] = field(default_factory=dict)
    samples: dict[Key, list[list[Sample]]] = field(default_factory=dict)  # by round
    ratios: dict[Key, list[float]] = field(default_factory=dict)  # peer over ours, by round
    limits: dict[tuple[str, str], list[tuple[float, float]]] = field(default_factory=dict)
    missing: list[dict[str, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def miss(self, system: System, name: str, reason: str) -> None:
        """Note what could not be had."""
        self.missing.append({"system": system.title, "format": name, "reason": reason})


def repeats_of(tokens: int) -> int:
    """Forwards of one measurement."""
    return next(count for most, count in REPEATS if tokens <= most)


def formats_needed(own: System, bits: Sequence[int], compared: Sequence[Format]) -> list[Format]:
    """Our formats of these bits, and one for each other kind of product of the peers' formats.

    A peer's format is held against our peak of the products it computes with: an 8-bit one may multiply in bf16, and
    integers may be compared where ours of as many bits are fp8.
    """
    needed = [kind for kind in own.formats if kind.bits in bits]
    for product in (False, True):
        if any(kind.bf16_peak == product for kind in compared) and all(kind.bf16_peak != product for kind in needed):
            needed += [kind for kind in own.formats if kind.bf16_peak == product][:1]
    return needed


class Comparison:
    """All processes of one thread count; a context manager, for they must end."""

    def __init__(
        self,
        peers: Sequence[System],
        *,
        data: LayerData,
        threads: int,
        bits: Sequence[int],
        peers_folder: Path,
        given: bool = False,
    ) -> None:
        self.data, self.bits, self.peers_folder, self.given = data, bits, peers_folder, given
        self.run = Run(threads)
        self.workers: dict[str, WorkerProcess] = {}
        self.rng = np.random.default_rng(2)
        self.check_ids = self.draw(CHECK_TOKENS)
        self.peers = list(peers)

    def __enter__(self) -> Comparison:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.close()

    def draw(self, tokens: int) -> list[list[int]]:
        """Uniform routing without repetition."""
        scores = self.rng.random((tokens, self.data.sizes.num_experts))
        return np.argsort(scores, axis=1)[:, : self.data.sizes.top_k].tolist()

    # --- loading ---

    def load(self, refused: Mapping[str, str]) -> None:
        """Start, load and check our tiers and every peer; what cannot be had is noted.

        Parameters
        ----------
        refused : mapping
            Peers that could not be installed, and why.

        Raises
        ------
        PeerError
            Our own library does not run, or is wrong.
        """
        for tier in dict.fromkeys(["", *(peer.tier for peer in self.peers)]):
            own = ours(tier, given=self.given)
            compared = [kind for peer in self.peers if peer.tier == tier for kind in self.wanted(peer)]
            self.start(own)
            for kind in formats_needed(own, self.bits, compared):
                self.load_format(own, kind)
        for peer in self.peers:
            kinds = self.wanted(peer)
            if not kinds:
                continue
            if peer.name in refused:
                self.run.miss(peer, "all", refused[peer.name])
                continue
            try:
                self.start(peer)
            except PeerError as error:
                self.run.miss(peer, "all", str(error))
                continue
            for kind in kinds:
                try:
                    self.load_format(peer, kind)
                except PeerError as error:
                    self.run.miss(peer, kind.name, str(error))

    def wanted(self, peer: System) -> list[Format]:
        """The formats of a peer that were asked for."""
        return [kind for kind in peer.formats if kind.bits in self.bits]

    def start(self, system: System) -> None:
        """Start the process of a system."""
        interpreter = install.interpreter(system, self.peers_folder)
        if interpreter is None:
            raise PeerError(f"not installed: --install-peers {system.name} installs {system.release}.")
        worker = WorkerProcess(system, interpreter, folder=self.data.folder, threads=self.run.threads)
        self.workers[system.name] = worker
        self.run.systems[system.name] = system
        self.run.versions[system.name] = worker.version
        self.run.loaded[system.name] = {}

    def load_format(self, system: System, kind: Format) -> None:
        """Load one format and compare one forward of it."""
        worker = self.workers[system.name]
        expert_bytes = worker.ask({"do": "load", "format": kind.name})["expert_bytes"]
        answer = worker.ask({"do": "check", "format": kind.name, "ids": self.check_ids})
        files = Path(answer["output"]), Path(answer["weights"])
        with np.load(files[1]) as packed:
            gate, up, down = (packed[name] for name in packed.files)
        batch = self.data.batch(self.check_ids)
        checked = compare.check(kind, np.load(files[0]), (gate, up, down), self.data, batch)
        for file in files:
            file.unlink()
        found = Loaded(kind, expert_bytes, checked)
        label = f"{system.title} {kind.name}"
        if checked.fault is not None:
            self.run.wrong.append(f"wrong result: {label} {checked.fault}")
        elif system.adapter != "peers.ours":
            own = self.ours_of(system, kind)
            found.difference, found.difference_bound = compare.against_ours(checked, own.checked)
            if found.difference > found.difference_bound:
                self.run.wrong.append(
                    f"wrong result: {label} differs by {found.difference:.4f} from ours on the same weights, more than "
                    f"the {found.difference_bound:.4f} that both formats explain."
                )
        self.run.loaded[system.name][kind.name] = found

    def ours_of(self, peer: System, kind: Format) -> Loaded:
        """Our format that a peer's format is compared with."""
        return next(own for own in self.run.loaded[ours(peer.tier).name].values() if own.kind.bits == kind.bits)

    # --- measuring ---

    def measure(self, token_counts: Sequence[int], rounds: int) -> Run:
        """All rounds."""
        for _ in range(rounds):
            self.calibrate()
            for tokens in token_counts:
                for peer in self.peers:
                    for kind in list(self.run.loaded.get(peer.name, {})):
                        self.measure_pair(peer, kind, tokens)
        return self.run

    def calibrate(self) -> None:
        """Read bandwidth and register peak of this round, with the weights and kernels of each of our formats."""
        for name, formats in self.run.loaded.items():
            if self.run.systems[name].adapter == "peers.ours":
                for kind in formats:
                    found = self.workers[name].ask({"do": "calibrate", "format": kind})
                    self.run.limits.setdefault((name, kind), []).append((found["read"], found["peak"]))

    def measure_pair(self, peer: System, name: str, tokens: int) -> None:
        """Ours and a peer's format, one after the other, on the same routing."""
        found = self.run.loaded[peer.name][name]
        own_name, own = ours(peer.tier).name, self.ours_of(peer, found.kind)
        ids = [self.draw(tokens) for _ in range(repeats_of(tokens))]
        mine = self.sample(own_name, own, ids, self.peak_of(own_name, own.kind))
        try:
            theirs = self.sample(peer.name, found, ids, self.peak_of(own_name, found.kind))
        except PeerError as error:
            self.run.miss(peer, name, str(error))
            self.drop(peer.name, name)
            return
        self.run.samples.setdefault((own_name, own.kind.name, tokens), []).append(mine)
        self.run.samples.setdefault((peer.name, name, tokens), []).append(theirs)
        ratio = statistics.median(s.seconds for s in theirs) / statistics.median(s.seconds for s in mine)
        self.run.ratios.setdefault((peer.name, name, tokens), []).append(ratio)

    def peak_of(self, own_name: str, kind: Format) -> tuple[float, float]:
        """Limits of this round for a format: read with our weights of its bits, peak of our products of its kind."""
        formats = self.run.loaded[own_name]
        same_bits = next(own for own in formats.values() if own.kind.bits == kind.bits)
        same_product = next(own for own in formats.values() if own.kind.bf16_peak == kind.bf16_peak)
        read, _ = self.run.limits[own_name, same_bits.kind.name][-1]
        _, peak = self.run.limits[own_name, same_product.kind.name][-1]
        return read, peak

    def sample(self, name: str, found: Loaded, ids: list[list[list[int]]], limits: tuple[float, float]) -> list[Sample]:
        """Time forwards with these experts."""
        sizes = self.data.sizes
        seconds = self.workers[name].ask({"do": "run", "format": found.kind.name, "ids": ids})["seconds"]
        return [
            Sample(
                seconds=taken,
                weight_bytes=len(np.unique(experts)) * found.expert_bytes,
                operations=2.0 * np.size(experts) * sizes.expert_weights,
                read=limits[0],
                peak=limits[1],
            )
            for taken, experts in zip(seconds, ids, strict=True)
        ]

    def drop(self, name: str, kind: str) -> None:
        """Forget a format that failed on the way; its figures would be of fewer rounds than the others'."""
        del self.run.loaded[name][kind]
        for table in (self.run.samples, self.run.ratios):
            for key in [key for key in table if key[:2] == (name, kind)]:
                del table[key]
