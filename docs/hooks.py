"""MkDocs hook: docstrings name other objects as Sphinx does, and the pages show the name alone."""

import re


def on_page_content(html: str, **kwargs: object) -> str:
    return re.sub(r":(?:func|class|meth|mod):(?=<code>)", "", html)
