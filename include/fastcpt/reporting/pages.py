"""HTML pages from the templates beside this module.

The template engine escapes all that it fills in: records hold what users and documents say.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).with_name("templates")
_ENVIRONMENT = Environment(
    loader=FileSystemLoader(TEMPLATES),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def page(template: str, **values: Any) -> str:
    """A page; a value that its template needs and does not get is an error."""
    return _ENVIRONMENT.get_template(template).render(values)
