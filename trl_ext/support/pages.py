"""HTML pages that need nothing else: style, script and data are inside, and the browser may load nothing more."""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: Path, *, data: Any, **values: Any) -> str:
    """Fills a template. Every value is escaped, so no text can bring markup or script into the page.

    Style and script are the files of the same name beside the template. The template finds them as `style` and
    `script`, and as `style_source` and `script_source` the hashes by which a content security policy allows them.

    Args:
        template: A file `NAME.html`.
        data: What the script reads, as JSON can hold it. The template writes it with the filter `tojson`.
        values: Everything else.
    """
    style, script = (template.with_suffix(ending).read_text(encoding="utf-8") for ending in (".css", ".js"))
    values |= {"style": style, "script": script, "style_source": source(style), "script_source": source(script)}
    return _environment(template.parent).get_template(template.name).render(data=data, **values)


def fragment(template: Path, **values: Any) -> str:
    """Fills a template that is a piece of a page, such as a table in a notebook. Every value is escaped."""
    return _environment(template.parent).get_template(template.name).render(**values)


def source(text: str) -> str:
    """Returns the hash of a style or a script as a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@functools.cache
def _environment(folder: Path) -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # in the given order, and without NaN, which a browser refuses
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "separators": (",", ":"), "allow_nan": False}
    return environment
