"""Whether coordinates can be of the coordinate system that is stated."""

import re
from collections.abc import Sequence

_IN_DEGREES = {4148, 4258, 4267, 4269, 4283, 4326, 4490, 4617, 4674, 4979}
_MERCATOR = 20_037_509.0
"""Half the length of the equator in EPSG:3857."""


def problem_of_place(
    crs: str, transform: Sequence[float], height: int, width: int, in_degrees: bool | None = None
) -> str:
    """What is impossible about a place; empty where nothing is.

    Degrees end at 90 and 180 (360 where longitudes begin at 0); a zone of UTM is some 800 km wide, and neighbouring
    scenes may lie in it too; nothing in metres has pixels of a hundredth and lies within 360 of the origin.

    Args:
        crs: `EPSG:<code>` or WKT.
        transform: (a, b, c, d, e, f) of the affine pixel-to-map transform.
        height: number of rows.
        width: number of columns.
        in_degrees: whether the CRS has longitude and latitude; None where its text shall tell.
    """
    match = re.fullmatch(r"EPSG:(\d+)", crs)
    code = int(match[1]) if match else 0
    if in_degrees is None:
        in_degrees = code in _IN_DEGREES or crs.startswith(("GEOG", "OGC:CRS84"))
    a, b, c, d, e, f = transform
    corners = [(column, row) for column in (0, width) for row in (0, height)]
    xs, ys = ([p * x + q * y + r for x, y in corners] for p, q, r in ((a, b, c), (d, e, f)))
    lies = f"x from {min(xs):.8g} to {max(xs):.8g} and y from {min(ys):.8g} to {max(ys):.8g} cannot be of {crs[:60]}"
    if in_degrees:
        if min(xs) < -180.5 or max(xs) > 360.5 or max(ys) > 90.5 or min(ys) < -90.5:
            return f"{lies}, which has degrees. State the right CRS: `rio edit-info --crs EPSG:<code> FILE`."
        return ""
    size = max(abs(a), abs(b), abs(d), abs(e))
    if (code or crs.startswith("PROJ")) and size < 0.05 and max(map(abs, xs)) <= 361 and max(map(abs, ys)) <= 91:
        return (
            f"{lies}, which has metres: these are degrees. State the right CRS: `rio edit-info --crs EPSG:4326 FILE`."
        )
    is_utm = 32600 < code <= 32660 or 32700 < code <= 32760
    if is_utm and (min(xs) < -1.5e6 or max(xs) > 2.5e6 or min(ys) < -1.05e7 or max(ys) > 2.05e7):
        return f"{lies}, a zone of UTM. State the right CRS: `rio edit-info --crs EPSG:<code> FILE`."
    if code == 3857 and max(map(abs, (*xs, *ys))) > 1.01 * _MERCATOR:
        return f"{lies}. State the right CRS: `rio edit-info --crs EPSG:<code> FILE`."
    return ""
