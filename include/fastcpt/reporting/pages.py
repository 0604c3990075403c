"""HTML pages from the templates beside this module.

The template engine escapes all values, as records contain text from users and documents.
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
    """A page. A value missing from ``values`` that the template needs is an error."""
    return _ENVIRONMENT.get_template(template).render(values)
