"""What a page needs of matplotlib's SVG: the page's own colours and letters, links, titles, and few bytes.

matplotlib knows only fixed colours, so a figure is drawn in one stand-in for each of the page's variables (report.css).
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

_VARIABLES = ("ink", "quiet", "rule", "paper", "pass", "fail", "skip", "attention", "mlp", "other")
COLORS: Mapping[str, str] = {name: f"#0000{i:02x}" for i, name in enumerate(_VARIABLES, start=1)}
_NAMES = {color: f"var(--{name})" for name, color in COLORS.items()}
_GEOMETRY = ("d", "x", "y", "transform")
_DROPPED = ("metadata", "style")


def elements(figure: Figure) -> Element:
    """The figure as an `svg` element for HTML: no namespaces, no ids but those that are referred to or are `gid`s."""
    stream = io.StringIO()
    FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None})
    root = ElementTree.fromstring(stream.getvalue())
    for element in root.iter():
        element.tag = _local(element.tag)
        if element.get("transform", "").startswith("rotate(-0 "):
            del element.attrib["transform"]
        element.attrib = {_local(name): _short(_local(name), value) for name, value in element.attrib.items()}
        element.text, element.tail = (element.text if element.tag == "text" else None), None
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in _DROPPED]:
            parent.remove(child)
        _hoist(parent)
    root.attrib = {"viewBox": root.attrib["viewBox"], **{side: root.attrib[side][:-2] for side in ("width", "height")}}
    return root


def take(root: Element, name: str) -> Element | None:
    """The element whose `gid` is `name`, taken out of the picture; None where there is none."""
    for parent in root.iter():
        for child in parent:
            if child.get("id") == name:
                parent.remove(child)
                return child
    return None


def styled_by_page(element: Element, name: str) -> Element:
    """`element` in class `name`, without any style of its own."""
    for each in element.iter():
        each.attrib.pop("style", None)
    element.set("class", name)
    return element


def describe(element: Element, title: str, description: str, prefix: str) -> None:
    """Give the picture a title and a description; the ids of both begin with `prefix`."""
    for at, (tag, text) in enumerate((("title", title), ("desc", description))):
        child = Element(tag, {"id": f"{prefix}-{tag}"})
        child.text = text
        element.insert(at, child)
    element.set("aria-labelledby", f"{prefix}-title {prefix}-desc")


def titled(element: Element, title: str) -> Element:
    """`element` with a title of its own."""
    child = Element("title")
    child.text = title
    element.insert(0, child)
    return element


def embolden(text: Element, words: Sequence[str]) -> None:
    """Set a name of two words as the page sets it: its second in the page's class for variants."""
    text.text = f"{words[0]} "
    SubElement(text, "tspan", {"class": "variant"}).text = words[1]


def written(root: Element) -> str:
    """The picture as a page holds it; ids that nothing refers to are left out."""
    text = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(r'href="#([^"]+)"', text)) | set((root.get("aria-labelledby") or "").split())
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _short(name: str, value: str) -> str:
    if name == "style":
        return _style(value)
    if name not in _GEOMETRY:
        return value
    return re.sub(r"\d+\.\d+", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), " ".join(value.split()))


def _style(value: str) -> str:
    """The page's colours for the stand-ins, and its letters for matplotlib's."""
    kept = [part.strip() for part in value.split(";") if part.strip() and not part.strip().startswith("font")]
    return re.sub(r"#[0-9a-f]{6}", lambda found: _NAMES[found[0]], ";".join(kept))


def _hoist(parent: Element) -> None:
    """Say once for a group of marks what style they have."""
    styles = {child.get("style") for child in parent}
    if len(parent) > 1 and len(styles) == 1 and all(child.tag == "use" for child in parent):
        parent.set("style", styles.pop() or "")
        for child in parent:
            child.attrib.pop("style", None)
