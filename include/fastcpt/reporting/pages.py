"""HTML pages from the templates beside this module.

The template engine escapes all that it fills in: records hold what users and documents say.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def page(template: str, **values: Any) -> str:
    """A page; a value that its template needs and does not get is an error."""
    return _TEMPLATES.get_template(template).render(values)
