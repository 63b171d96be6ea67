"""Write `report.html` and `report.md` of a run folder, from its files alone: no model, no notes."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medlit.atomic_io import atomic_write
from medlit.report.content import content
from medlit.report.figures import CAPTIONS, figures
from medlit.report.systems import MODEL, comparable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FACTS = "test_facts.json"
FILES = ("report.html", "report.md")


def write_report(folder: Path) -> dict[str, Figure]:
    """Write both pages; without any system's files there is nothing to write.

    Args:
        folder: a run folder with `test_metrics.json`, or the files of a baseline.

    Returns:
        The figures in them, by name.

    Raises:
        UserError: a system's files are damaged.
    """
    found, others = comparable(folder)
    if not found:
        return {}
    facts = folder / FACTS
    config = folder / "config_test.yaml"
    values = content(found, json.loads(facts.read_text(encoding="utf-8")) if facts.is_file() else {})
    drawn = figures(found)
    values |= {
        "others": [system.title for system in others],
        "title": "How good is it?" if found[0].name == MODEL else f"How good is {found[0].title}?",
        "run_name": f"{folder.absolute().parent.name}/{folder.name}",
        "captions": CAPTIONS,
        "pictures": {name: _inline(figure) for name, figure in drawn.items()},
        "config": config.read_text(encoding="utf-8").rstrip() if config.is_file() else None,
    }
    for name in FILES:
        with atomic_write(folder / name) as path:
            path.write_text(_render(name, values), encoding="utf-8")
    return drawn


def _render(name: str, values: dict[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("medlit", "report"),
        autoescape=name.endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    # A bar in a label would end a cell of a Markdown table.
    environment.filters["cell"] = lambda value: str(value).replace("|", r"\|")
    suffix = Path(name).suffix
    return environment.get_template(f"page{suffix}.j2").render(values) + "\n"


def _inline(figure: Figure) -> str:
    """A figure as a data URI: the page needs no other file."""
    import matplotlib as mpl

    stream = io.BytesIO()
    # The same figure is the same file.
    with mpl.rc_context({"svg.hashsalt": "medlit"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}"
