"""JSON values, a style sheet and scripts as one HTML file that loads nothing."""

import base64
import hashlib
import html
import importlib.resources
import json
import string
from typing import Any

# One script, in this order: what stands later uses what stands earlier.
SCRIPTS = (
    "recurrence.js",
    "dom.js",
    "charts.js",
    "sections.js",
    "drawing.js",
    "watch.js",
    "comparison.js",
    "main.js",
)


def static(name: str) -> str:
    """One of the page's source files."""
    return importlib.resources.files(__package__).joinpath("static", name).read_text(encoding="utf-8")


def embedded_json(value: Any) -> str:
    """JSON that can stand in a script element: no text of it ends the element or opens a comment.

    Raises:
      ValueError: a number is NaN or infinite.
    """
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e")


def render(report: dict[str, Any]) -> str:
    """The page that shows a report.

    Its policy lets nothing run or apply but the script and the style sheet put in here, and nothing load.

    Args:
      report: JSON values, as `build.gather` makes them.
    """
    script = "(() => {\n'use strict';\n" + "\n".join(map(static, SCRIPTS)) + "\n})();"
    style = static("report.css")
    # What is put in is not searched for names to replace.
    return string.Template(static("template.html")).substitute(
        TITLE=html.escape(f"{report['title']}: report"),
        POLICY=f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        STYLE=style,
        DATA=embedded_json(report),
        SCRIPT=script,
    )


def _source(text: str) -> str:
    """A content security policy's name for an inline element with this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
