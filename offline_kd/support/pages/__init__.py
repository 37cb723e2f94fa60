"""Pages by themselves: Jinja2 templates and one style sheet for the report, the card of a store and one sample.

A page loads nothing from elsewhere, and has no style and no script but what lies here, which its policy names by hash:
the style sheet, and beside the template `TEMPLATE.css` and `TEMPLATE.js`, where there are such. Every name in it is
escaped: stores are shared.
"""

import base64
import hashlib
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, TemplateNotFound
from markupsafe import Markup


@cache
def _environment() -> Environment:
    loader = PackageLoader("offline_kd.support.pages", ".")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def render_page(template: str, **content: object) -> str:
    """The page of `TEMPLATE.html.j2`; raises jinja2.UndefinedError when a name that it uses is missing."""
    environment = _environment()
    style, script = _source("style.css") + _source(f"{template}.css"), _source(f"{template}.js")
    page = environment.get_template(f"{template}.html.j2")
    return page.render(
        style=Markup(style), style_hash=_hash(style), script=Markup(script), script_hash=_hash(script), **content
    )


def _source(name: str) -> str:
    environment = _environment()
    assert environment.loader is not None
    try:
        return environment.loader.get_source(environment, name)[0]
    except TemplateNotFound:
        return ""


def _hash(content: str) -> Markup:
    return Markup(f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}")


def data_url(content: bytes, media_type: str) -> str:
    """Bytes as an address that needs no request: `media_type` as in `image/png`."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
