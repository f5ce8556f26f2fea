"""HTML from plain values. Whatever comes from a run, model output above all, passes through ``escape``."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

CSP = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""No script runs and nothing is fetched, whatever the page holds."""
_CONTROLS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "␡"}
_CONTROLS |= {code: f"[U+{code:04X}]" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}  # turn text around
_CSS = """
:root{color-scheme:light;--line:#d9dde3;--soft:#f4f6f8;--quiet:#59636e;--bad:#b3261e}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:0 12px 48px;color:#1b1f24;background:#fff;
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:1.5rem;margin:20px 0 0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:32px 0 10px;padding-bottom:4px;border-bottom:1px solid var(--line)}
p{margin:6px 0;overflow-wrap:anywhere}
.quiet{color:var(--quiet)}.bad{color:var(--bad)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:8px;margin:16px 0}
.cards div{background:var(--soft);border-radius:6px;padding:8px 10px;overflow-wrap:anywhere}
.cards b{display:block;font-size:1.1rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,360px),1fr));gap:12px}
figure{margin:0}figcaption{font-size:.9rem;overflow-wrap:anywhere}
.key span{margin-right:14px;display:inline-block;max-width:100%;overflow-wrap:anywhere;font-size:.85rem}
.key i{display:inline-block;width:11px;height:11px;margin-right:4px;border-radius:2px}
img{display:block;width:100%;height:auto}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.9rem}
th,td{padding:4px 10px 4px 0;text-align:right;border-bottom:1px solid var(--line);vertical-align:top;white-space:nowrap}
th:first-child,td:first-child{text-align:left}
.text{text-align:left;white-space:pre-wrap;min-width:9em;max-width:60em;overflow-wrap:anywhere}
details{border:1px solid var(--line);border-radius:6px;margin:8px 0;padding:6px 10px}
summary{cursor:pointer;overflow-wrap:anywhere}
pre{margin:6px 0;padding:8px;background:var(--soft);border-radius:4px;white-space:pre-wrap;overflow-wrap:anywhere;
unicode-bidi:isolate;font:13px/1.45 ui-monospace,"DejaVu Sans Mono",monospace}
"""


class Html(str):
    """Markup that is finished; any other string is text."""


def plain(value: object) -> str:
    """``value`` as text that every encoding and XML can hold: control characters are made visible."""
    return str(value).encode("utf-8", "replace").decode().translate(_CONTROLS)


def escape(value: object) -> Html:
    return value if isinstance(value, Html) else Html(html.escape(plain(value)))


def element(tag: str, *content: object, class_: str = "") -> Html:
    """``<tag class=...>content</tag>``; content that is not ``Html`` is escaped."""
    opening = f'{tag} class="{escape(class_)}"' if class_ else tag
    return Html(f"<{opening}>{''.join(map(escape, content))}</{tag}>")


def section(title: str, *content: object) -> Html:
    return element("section", element("h2", title), *content)


def folded(summary: object, *content: object) -> Html:
    """Shown when its summary is touched."""
    return element("details", element("summary", summary), *content)


def table(header: Sequence[object], rows: Sequence[Sequence[object]], text_columns: Sequence[int] = ()) -> Html:
    """A table that scrolls by itself where it is wider than the page; text columns wrap."""

    def line(tag: str, row: Sequence[object]) -> Html:
        cells = (element(tag, cell, class_="text" if at in text_columns else "") for at, cell in enumerate(row))
        return element("tr", *cells)

    head, body = element("thead", line("th", header)), element("tbody", *(line("td", row) for row in rows))
    return element("div", element("table", head, body), class_="scroll")


def cards(pairs: Sequence[tuple[str, object]]) -> Html:
    """Figures in large print, each under its name."""
    return element("div", *(element("div", name, element("b", value)) for name, value in pairs), class_="cards")


def picture(svg: str, caption: object, what: str) -> Html:
    """``what`` it shows, for who cannot see it."""
    return element("figure", element("figcaption", caption), Html(f'<img src="{_inline(svg)}" alt="{escape(what)}">'))


def wide_picture(narrow: str, wide: str, what: str) -> Html:
    """``wide`` on a desk, ``narrow`` on a phone."""
    source = f'<source media="(min-width: 800px)" srcset="{_inline(wide)}">'
    return element("figure", Html(f'<picture>{source}<img src="{_inline(narrow)}" alt="{escape(what)}"></picture>'))


def color_key(title: str, names: Sequence[str], colors: Sequence[str]) -> Html:
    """What the colours of a picture mean."""
    spots = (Html(f'<i style="background:{escape(color)}"></i>') for color in colors)
    pairs = (element("span", spot, name) for name, spot in zip(names, spots, strict=False))
    return element("p", element("span", f"{title}:"), *pairs, class_="key")


def document(title: str, *content: object) -> str:
    """The whole page."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(CSP)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"{element('title', title)}<style>{_CSS}</style></head>\n<body>"
        + "\n".join(map(escape, content))
        + "</body></html>\n"
    )


def _inline(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
