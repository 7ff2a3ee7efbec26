"""Docstrings have Sphinx's roles and literal blocks, which read well in a terminal; the site wants Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|meth|func|mod|data|attr):`(~?)([^`]+)`")
TABLE = re.compile(r"^([ ]*)(=+(?:  +=+)+)\n.*\n\1=+(?:  +=+)+$", re.MULTILINE | re.DOTALL)


def to_markdown(text: str) -> str:
    """Roles become code, ``::`` before an indented block a colon, tables drawn with = code as they stand."""

    def code(match: re.Match[str]) -> str:
        name = match[2]
        return f"`{name.rsplit('.', 1)[-1] if match[1] else name}`"

    text = ROLE.sub(code, text)
    text = TABLE.sub(lambda match: f"{match[1]}```text\n{match[0]}\n{match[1]}```", text)
    text = re.sub(r"^::$", "", text, flags=re.MULTILINE)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


class Roles(griffe.Extension):
    """Translates every docstring as it is collected."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
