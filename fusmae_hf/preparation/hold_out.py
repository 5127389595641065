"""Which pairs are held out, so that no ground is in two splits."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import NamedTuple

import numpy as np

from fusmae_hf.data.pairs import Place

SPLIT_BY = re.compile(r"scene|place|block:(\d+(?:\.\d+)?)")

_TOUCHING = 1e-3
"""Share of its side by which a footprint may reach into another one, by rounding: they touch."""


class HeldOut(NamedTuple):
    """What goes to validation.

    Attributes:
        held_out: numbers of the pairs.
        dropped: numbers of those that lie on both sides of a cut.
        summary: in words.
    """

    held_out: np.ndarray
    dropped: np.ndarray
    summary: str


def draw_held_out(places: Sequence[Place | None], share: float, seed: int, split_by: str = "place") -> HeldOut:
    """Draw pairs for validation.

    Pairs whose footprints share area stay together; edges do not count. Without a georeference those of a scene stay
    together. Where a group is much larger than what is asked for, it is cut along a line, and the pairs astride it
    are dropped.

    Args:
        places: of each pair; None where nobody knows, and the pair stands for itself.
        share: of the pairs, above 0.
        seed: of the draw.
        split_by: `"place"`; `"scene"`, which keeps all of a scene together; or `"block:SIZE"`, squares of ground of
            that side in units of the CRS, where pairs that lie in blocks of both splits are dropped.

    Raises:
        ValueError: `split_by` is unknown, or nothing can be held out without all else.
    """
    if not (match := SPLIT_BY.fullmatch(split_by)):
        raise ValueError(f"split_by is {split_by!r}, but must be scene, place or block:SIZE, such as block:5000.")
    wanted, generator = max(1, round(share * len(places))), np.random.default_rng(seed)
    if match[1]:
        chosen, dropped = _by_blocks(places, wanted, float(match[1]), generator)
    else:
        groups = _groups(places, split_by == "scene")
        chosen, dropped = _by_groups(places, groups, wanted, generator)
    kept = len(places) - len(dropped)
    if not chosen or len(chosen) == kept:
        raise ValueError(
            f"No part of the {len(places):,} pairs can be held out without touching the ground of the rest: they lie "
            "on one another. Give a column or field `split`, smaller blocks, or no --hold-out."
        )
    summary = f"Held out {len(chosen):,} of {kept:,} pairs ({len(chosen) / kept:.1%} of {share:.1%} asked)"
    if dropped:
        summary += f"; {len(dropped):,} pairs astride the border were dropped"
    return HeldOut(np.array(sorted(chosen)), np.array(sorted(dropped), dtype=np.int64), summary + ".")


def _groups(places: Sequence[Place | None], by_scene: bool) -> list[list[int]]:
    """Pairs that must stay together, by number."""
    parents = list(range(len(places)))

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    first_of_scene: dict[str, int] = {}
    boxes: dict[str, list[int]] = defaultdict(list)
    for number, place in enumerate(places):
        if place is None:
            continue
        if by_scene or place.crs is None:
            parents[root(number)] = root(first_of_scene.setdefault(place.scene, number))
        if place.crs is not None:
            boxes[place.crs].append(number)
    for crs, of_crs in boxes.items():
        first_there: dict[tuple[float, ...], int] = {}
        for number in of_crs:  # scenes of one place at several dates
            parents[root(number)] = root(first_there.setdefault(places[number].box, number))  # type: ignore[union-attr]
        boxes[crs] = members = list(first_there.values())
        for one, other in _sharing_area(list(first_there)):
            parents[root(members[one])] = root(members[other])
    if len(boxes) > 1:
        members = [number for of_crs in boxes.values() for number in of_crs]
        for one, other in _sharing_area([_in_degrees(places[number]) for number in members]):  # type: ignore[arg-type]
            if places[members[one]].crs != places[members[other]].crs:  # type: ignore[union-attr]
                parents[root(members[one])] = root(members[other])
    groups: dict[int, list[int]] = defaultdict(list)
    for number in range(len(places)):
        groups[root(number)].append(number)
    return list(groups.values())


def _sharing_area(boxes: Sequence[tuple[float, ...]]) -> Iterator[tuple[int, int]]:
    """Pairs of boxes (left, bottom, right, top) that share area; by cells as large as the largest box."""
    if not boxes:
        return
    sides = np.array(boxes)
    cell = max(float((sides[:, 2:] - sides[:, :2]).max()), 1e-12)
    cells: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, (left, bottom, right, top) in enumerate(boxes):
        columns = range(int(left // cell), int(right // cell) + 1)
        for at in product(columns, range(int(bottom // cell), int(top // cell) + 1)):
            cells[at].append(number)
    for members in cells.values():
        for one, other in combinations(members, 2):
            if _share_area(boxes[one], boxes[other]):
                yield one, other


def _share_area(one: Sequence[float], other: Sequence[float]) -> bool:
    for low in (0, 1):
        common = min(one[low + 2], other[low + 2]) - max(one[low], other[low])
        if common <= _TOUCHING * min(one[low + 2] - one[low], other[low + 2] - other[low]):
            return False
    return True


def _in_degrees(place: Place) -> tuple[float, ...]:
    from rasterio.warp import transform_bounds

    return transform_bounds(place.crs, "EPSG:4326", *place.box)


def _by_groups(
    places: Sequence[Place | None], groups: list[list[int]], wanted: int, generator: np.random.Generator
) -> tuple[set[int], set[int]]:
    """Whole groups, as many as come closest to what is wanted; a part of one where none does."""
    chosen: set[int] = set()
    large: list[list[int]] = []
    for number in generator.permutation(len(groups)).tolist():
        group = groups[number]
        if abs(len(chosen) + len(group) - wanted) < wanted - len(chosen):
            chosen.update(group)
        elif len(group) > 1:
            large.append(group)
    missing = wanted - len(chosen)
    if large and 2 * missing > wanted:
        part, dropped = _cut(places, max(large, key=len), missing)
        if chosen or part or len(groups) == 1:
            return chosen | part, dropped
        least = min(large, key=lambda group: len(group))
        return set(least), set()  # more than was asked for, but the least there is
    return chosen, set()


def _cut(places: Sequence[Place | None], group: list[int], wanted: int) -> tuple[set[int], set[int]]:
    """About so many pairs at one end of a group, and those astride the line that cuts them off."""
    boxes = np.array([place.box for number in group if (place := places[number])])
    if len(boxes) < len(group):
        return set(), set()
    best: tuple[float, set[int], set[int]] = (float("inf"), set(), set())
    for low in (0, 1):
        starts, ends = boxes[:, low], boxes[:, low + 2]
        margin = _TOUCHING * (ends - starts).min()
        for line in np.unique(ends):
            inside, beyond = ends <= line + margin, starts >= line - margin
            lost = len(group) - int(inside.sum()) - int(beyond.sum())
            if not inside.any() or not beyond.any():
                continue
            cost = abs(int(inside.sum()) - wanted) + lost / 4
            if cost < best[0]:
                numbers = np.array(group)
                best = cost, set(numbers[inside].tolist()), set(numbers[~inside & ~beyond].tolist())
    return best[1], best[2]


def _by_blocks(
    places: Sequence[Place | None], wanted: int, size: float, generator: np.random.Generator
) -> tuple[set[int], set[int]]:
    """Blocks of ground, as many as hold what is wanted, and pairs that lie in blocks of both splits."""
    touched: list[list[tuple[str, int, int]]] = []
    for place in places:
        if place is None:
            raise ValueError("Blocks need to know where pairs lie, which this dataset does not tell.")
        left, bottom, right, top = place.box
        margin = _TOUCHING * min(right - left, top - bottom)
        columns = range(int((left + margin) // size), int((right - margin) // size) + 1)
        rows = range(int((bottom + margin) // size), int((top - margin) // size) + 1)
        ground = place.crs or place.scene
        touched.append([(ground, column, row) for column, row in product(columns, rows)])
    blocks = sorted({block for of_pair in touched for block in of_pair})
    whole: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    for number, of_pair in enumerate(touched):
        if len(of_pair) == 1:
            whole[of_pair[0]].append(number)
    taken: set[tuple[str, int, int]] = set()
    chosen: set[int] = set()
    for number in generator.permutation(len(blocks)).tolist():
        members = whole[blocks[number]]
        if members and abs(len(chosen) + len(members) - wanted) < wanted - len(chosen):
            taken.add(blocks[number])
            chosen.update(members)
    dropped = set()
    for number, of_pair in enumerate(touched):
        inside = [block in taken for block in of_pair]
        if all(inside):
            chosen.add(number)
        elif any(inside):
            dropped.add(number)
    return chosen, dropped
