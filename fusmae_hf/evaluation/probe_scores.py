"""What linear probes of some features reached, as a card tells it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusmae_hf.evaluation.intervals import Interval


@dataclass(frozen=True)
class ProbeScore:
    """What a linear probe of some features reached, for a card.

    Attributes:
        encoder: whose features.
        sensors: which sensors were shown, in words.
        labels: share of the labels that the probe learnt from, in words.
        metric: name of the score.
        score: mean over the seeds, in [0, 1], and its 95 % interval.
        seeds: how many.
    """

    encoder: str
    sensors: str
    labels: str
    metric: str
    score: "Interval"
    seeds: int


def probe_table(scores: Sequence[ProbeScore]) -> str:
    """Markdown table of probes: a row for each encoder and choice of sensors, a column for each share of labels."""
    shares = list(dict.fromkeys(score.labels for score in scores))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for score in scores:
        low, high = 100 * score.score.low, 100 * score.score.high
        cell = f"{100 * score.score.estimate:.1f}" + (f" [{low:.1f}, {high:.1f}]" if high > low else "")
        rows.setdefault((score.encoder, score.sensors), {})[score.labels] = cell
    lines = [f"| features | sensors | {' | '.join(f'{share} of the labels' for share in shares)} |"]
    lines.append("|---|---|" + "---|" * len(shares))
    lines += [
        f"| {encoder} | {sensors} | {' | '.join(cells.values())} |" for (encoder, sensors), cells in rows.items()
    ]
    return "\n".join(lines)
