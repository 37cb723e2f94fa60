"""Pages by themselves: Jinja2 templates and one style sheet for the report, the card of a store and one sample.

A page loads nothing from elsewhere, has no script and no style but its style sheet, which its policy names by hash.
Every name in it is escaped: stores are shared.
"""

import base64
import hashlib
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


@cache
def _environment() -> Environment:
    loader = PackageLoader("offline_kd.support.pages", ".")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def render_page(template: str, **content: object) -> str:
    """The page of `TEMPLATE.html.j2`; raises jinja2.UndefinedError when a name that it uses is missing."""
    environment = _environment()
    assert environment.loader is not None
    style, _, _ = environment.loader.get_source(environment, "style.css")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    page = environment.get_template(f"{template}.html.j2")
    return page.render(style=Markup(style), style_hash=Markup(f"sha256-{digest}"), **content)


def data_url(content: bytes, media_type: str) -> str:
    """Bytes as an address that needs no request: `media_type` as in `image/png`."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
