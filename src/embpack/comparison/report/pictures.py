"""The picture of loss against bytes, as a file by itself: SVG, and PNG."""

import io
import re
from importlib.resources import files
from importlib.util import find_spec
from typing import Any
from xml.etree import ElementTree

import embpack
from embpack.comparison.checkpoint import FileComparison
from embpack.comparison.report.scatter import draw_error_against_bytes
from embpack.comparison.report.subject import Subject
from embpack.comparison.report.svg import WIDE, Picture, element, text
from embpack.errors import MissingExtraError

_MARGIN = 12.0
# Dots an inch of the PNG, of which matplotlib takes a pixel of the SVG to be a hundredth.
_DPI = 200
# matplotlib's font is wider than those by which places of labels are reckoned.
_FONT_SCALE = 0.9


def make_svg(comparison: FileComparison) -> str:
    """Draw loss against bytes, of all tables together, as the text of a file by itself."""
    picture = _draw(comparison)
    made = element("metadata", f"embpack {embpack.__version__}") + f"<style>{_read_style()}</style>"
    ground = element("rect", class_="ground", x=-_MARGIN, y=-_MARGIN, width="100%", height="100%")
    return picture.write(made + ground + picture.content, _MARGIN) + "\n"


def make_png(comparison: FileComparison) -> bytes:
    """Draw what make_svg draws, as the bytes of a PNG file, twice as large in pixels.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    picture = _draw(comparison)
    width, height = picture.width + 2 * _MARGIN, picture.height + 2 * _MARGIN
    rules = _parse_style()
    figure = Figure(figsize=(width / 100, height / 100), dpi=_DPI, facecolor=rules["ground"]["fill"])
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-_MARGIN, width - _MARGIN)
    axes.set_ylim(height - _MARGIN, -_MARGIN)
    axes.axis("off")
    _add_shapes(axes, ElementTree.fromstring(f"<g>{picture.content}</g>"), rules, 0.0, 0.0)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": f"embpack {embpack.__version__}"})
    return file.getvalue()


def require_matplotlib() -> None:
    """Raise MissingExtraError unless matplotlib is installed."""
    if find_spec("matplotlib") is None:
        raise MissingExtraError("a PNG picture", "matplotlib", "png")


def _draw(comparison: FileComparison) -> Picture:
    if not comparison.overall:
        said = "No way that was measured packs all tables."
        return Picture(text(said, 0, 20), WIDE, 40, said)
    results, front, recommended = comparison.overall, comparison.front, comparison.recommended
    return draw_error_against_bytes(Subject("all tables", results, front, recommended), WIDE)


def _read_style() -> str:
    """Read how pictures look, light, with colours in place of their names, which not all programs know."""
    css = (files("embpack.comparison.report") / "chart.css").read_text()
    colours = dict(re.findall(r"(--\w+): (#\w+);", css))
    css = re.sub(r":root \{.*?\}\n", "", css, flags=re.DOTALL).replace("svg ", "")
    return re.sub(r"var\((--\w+)\)", lambda found: colours[found[1]], css)


def _parse_style() -> dict[str, dict[str, str]]:
    """Read the properties of each class, and of text."""
    rules = re.findall(r"^\.?([\w.-]+) \{(.*?)\}", _read_style(), re.MULTILINE)
    return {name: dict(re.findall(r"([\w-]+): ([^;]+);", rule)) for name, rule in rules}


def _add_shapes(axes: Any, parent: ElementTree.Element, rules: dict[str, dict[str, str]], x: float, y: float) -> None:
    """Add what there is in a group whose origin is at (x, y)."""
    for shape in parent:
        style: dict[str, str] = dict(rules["text"]) if shape.tag == "text" else {}
        for name in shape.get("class", "").split():
            style |= rules.get(name, {})
        if shape.tag == "g":
            left, top = re.findall(r"[\d.]+", shape.get("transform", "translate(0 0)"))
            _add_shapes(axes, shape, rules, x + float(left), y + float(top))
        elif shape.tag == "text":
            _add_text(axes, shape, style)
        elif shape.tag == "circle":
            _add_circle(axes, shape, style, x, y)
        else:
            _add_line(axes, shape, style)


def _add_circle(axes: Any, shape: ElementTree.Element, style: dict[str, str], x: float, y: float) -> None:
    from matplotlib.patches import Circle

    axes.add_patch(Circle((x, y), float(shape.get("r", "0")), zorder=4, **_paint(style)))


def _add_line(axes: Any, shape: ElementTree.Element, style: dict[str, str]) -> None:
    if shape.tag == "line":
        ends = [float(shape.get(name, "0")) for name in ("x1", "x2", "y1", "y2")]
        xs, ys = ends[:2], ends[2:]
    else:
        numbers = [float(number) for number in re.findall(r"[\d.]+", shape.get("d", ""))]
        xs, ys = numbers[::2], numbers[1::2]
    dashes = (0, (1, 3)) if "stroke-dasharray" in style else "solid"
    axes.plot(xs, ys, color=style["stroke"], linewidth=_points(style["stroke-width"]), linestyle=dashes, zorder=2)


def _add_text(axes: Any, shape: ElementTree.Element, style: dict[str, str]) -> None:
    from matplotlib.patheffects import withStroke

    halo = (
        [withStroke(linewidth=_points(style["stroke-width"]), foreground=style["stroke"])] if "stroke" in style else []
    )
    axes.text(
        float(shape.get("x", "0")),
        float(shape.get("y", "0")),
        shape.text,
        fontsize=_FONT_SCALE * _points(style["font-size"]),
        fontweight="bold" if "font-weight" in style else "normal",
        color=style["fill"],
        ha={"end": "right", "middle": "center"}.get(style.get("text-anchor", ""), "left"),
        va="baseline",
        path_effects=halo,
        zorder=3,
        parse_math=False,
    )


def _paint(style: dict[str, str]) -> dict[str, Any]:
    width = _points(style["stroke-width"]) if "stroke-width" in style else 0.0
    return {"facecolor": style["fill"], "edgecolor": style["stroke"], "linewidth": width}


def _points(pixels: str) -> float:
    """Turn pixels into points, of which there are 72 an inch, and of pixels 100."""
    return 0.72 * float(pixels.removesuffix("px"))
