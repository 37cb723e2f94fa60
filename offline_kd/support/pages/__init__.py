"""Pages by themselves: Jinja2 templates and one style sheet for the report, the card of a store and one sample.

A page loads nothing from elsewhere and has no script. Every name in it is escaped: stores are shared.
"""

import base64
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined


@cache
def _environment() -> Environment:
    loader = PackageLoader("offline_kd.support.pages", ".")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def render_page(template: str, **content: object) -> str:
    """The page of `TEMPLATE.html.j2`; raises jinja2.UndefinedError when a name that it uses is missing."""
    return _environment().get_template(f"{template}.html.j2").render(**content)


def data_url(content: bytes, media_type: str) -> str:
    """Bytes as an address that needs no request: `media_type` as in `image/png`."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
