"""The file of a page: everything inside, nothing fetched."""

import base64
import hashlib
import json
from collections.abc import Mapping
from typing import Any, cast

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def render(data: Mapping[str, Any]) -> str:
    """The page as HTML. Its rules let no script run but its own, and nothing be fetched."""
    pages = Environment(loader=PackageLoader("eigendecomp", "page"), autoescape=True, undefined=StrictUndefined)
    script, style = (cast(Any, pages.loader).get_source(pages, name)[0] for name in ("script.js", "style.css"))
    content = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":  # so that no text can end the element that it stands in
        content = content.replace(sign, f"\\u{ord(sign):04x}")
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style)]
    return pages.get_template("page.html").render(
        title=data["title"],
        data=Markup(content),
        script=Markup(script),
        style=Markup(style),
        script_hash=hashes[0],
        style_hash=hashes[1],
    )
