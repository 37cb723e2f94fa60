"""Pages by themselves: Jinja2 templates and one style sheet for the report, the card of a store and one sample.

A page loads nothing from elsewhere, and has no style but its style sheet and no script but the one of its template, if
there is one: its policy names both by hash. Every name in it is escaped: stores are shared.
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
    style = _source("style.css")
    page = environment.get_template(f"{template}.html.j2")
    return page.render(style=Markup(style), style_hash=_hash(style), **content)


def script_of(template: str) -> dict[str, Markup]:
    """What the page of `TEMPLATE.html.j2` needs to have `TEMPLATE.js` in it and in its policy."""
    script = _source(f"{template}.js")
    return {"script": Markup(script), "script_hash": _hash(script)}


def _source(name: str) -> str:
    environment = _environment()
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _hash(text: str) -> Markup:
    """As a policy names it."""
    return Markup(f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}")


def data_url(content: bytes, media_type: str) -> str:
    """Bytes as an address that needs no request: `media_type` as in `image/png`."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
