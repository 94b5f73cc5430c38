"""Formulas and references of the docs, made while mkdocs builds them.

Formulas become MathML, which browsers show by themselves: no script, no request to another site.
Pages write them as ``$...$`` and ``$$...$$``, docstrings in Sphinx's way.
"""

import html
import re

from latex2mathml.converter import convert

DISPLAY = (
    re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL),
    re.compile(r"<p>\.\. math:: (.*?)</p>", re.DOTALL),
)
INLINE = (
    re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL),
    re.compile(r":math:<code>(.*?)</code>", re.DOTALL),
)
REFERENCE = re.compile(r":(?:attr|class|func|meth|mod|obj):<code>~?(.*?)</code>")


def on_page_content(content: str, **_: object) -> str:
    """Replace the formulas and the references of one page."""
    for pattern in DISPLAY:
        content = pattern.sub(lambda found: f"<p>{_mathml(found[1], 'block')}</p>", content)
    for pattern in INLINE:
        content = pattern.sub(lambda found: _mathml(found[1], "inline"), content)
    return REFERENCE.sub(lambda found: f"<code>{found[1].rpartition('.')[2]}</code>", content)


def _mathml(latex: str, display: str) -> str:
    # \big only makes delimiters larger, which MathML does by itself.
    plain = re.sub(r"\\(?:big|Big|bigg|Bigg)[lr]?(?![a-zA-Z])", "", html.unescape(latex))
    return convert(plain.strip(), display=display)
