"""The frame of our HTML files, which need nothing else: one style, and a page's parts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

# Blue, orange and green of M. Okabe and K. Ito, "Color Universal Design" (2008); lighter ones on dark. Nothing is told by
# color alone: the floor is an outline or gray, percentiles are dashed, a verdict is a word.
_STYLE = """
:root{--bg:#fff;--fg:#1b1b1b;--muted:#5a5a5a;--grid:#e3e3e3;--found:#0072b2;--floor:#6f6f6f;--bad:#b3261e;--ok:#00664b;
--sampled:#0072b2;--prompt:#c77700;--prefix:#009e73;--lonely:#b3261e;--outer:#e9f1f7;--inner:#cfe3f1;--card:#f6f6f6}
@media (prefers-color-scheme:dark){:root{--bg:#15181b;--fg:#e8e8e8;--muted:#a9a9a9;--grid:#31363b;--found:#56b4e9;
--floor:#b0b0b0;--bad:#ff8a7a;--ok:#5fd3ac;--sampled:#56b4e9;--prompt:#e69f00;--prefix:#3fd0a0;--lonely:#ff8a7a;
--outer:#1d2833;--inner:#263c4f;--card:#1e2226}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:64rem;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.3rem;margin:.2rem 0}h2{font-size:1.15rem;margin:2.2rem 0 .3rem}p{margin:.4rem 0}
.verdict{display:inline-block;padding:.15rem .7rem;border-radius:.4rem;border:2px solid;font-weight:700}
.ok{color:var(--ok)}.bad{color:var(--bad)}.muted,.read{color:var(--muted)}.read{max-width:46rem}
.note{border-left:4px solid var(--prompt);padding:.2rem .7rem;background:var(--card)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.87rem;margin:.5rem 0}
th,td{text-align:left;padding:.22rem .6rem;border-bottom:1px solid var(--grid);vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.wide{overflow-wrap:anywhere;min-width:14rem}
thead th{border-bottom:2px solid var(--muted)}
code{font:.86em ui-monospace,monospace;overflow-wrap:anywhere}
code.whole{white-space:nowrap}
table.heat td{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums;border:1px solid var(--bg)}
table.heat td.none{color:var(--muted);text-align:center}
table.heat th[scope=row]{min-width:7rem}
.legend span{display:inline-block;padding:0 .5rem;font-size:.8rem}
figure{margin:.4rem 0}figcaption{font-weight:600}
svg{display:block;width:100%;height:auto;max-width:48rem;min-width:26rem}
.row svg{min-width:20rem}
.row{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:.5rem 1rem}
svg text{font:13px system-ui,sans-serif;fill:var(--muted)}svg text.name{fill:var(--fg)}svg text.small{font-size:12px}
.grid{stroke:var(--grid);stroke-width:1}rect.found{fill:var(--found)}
polyline{fill:none;stroke-linejoin:round}polyline.floor{stroke:var(--floor);stroke-width:2}
polyline.found{stroke:var(--found)}.line{stroke-width:2.2}.dashed{stroke-dasharray:6 4;stroke-width:1.6}
.diagonal{stroke:var(--muted);stroke-width:1}
.dot{fill:none;stroke-width:4.5;stroke-linecap:round;opacity:.55}
.sampled{stroke:var(--sampled)}.prompt{stroke:var(--prompt)}.prefix{stroke:var(--prefix)}
.dot.lonely{stroke:var(--lonely);opacity:1;stroke-width:7}.band.outer{fill:var(--outer)}.band.inner{fill:var(--inner)}
.key{display:inline-block;width:1.5em;height:0;border-top:3px solid;vertical-align:middle;margin:0 .3em 0 .9em}
.key.found{border-color:var(--found)}.key.floor{border-color:var(--floor)}.key.dash{border-top-style:dashed}
.key.round{width:.7em;height:.7em;border:0;border-radius:50%}
.key.sampled{background:var(--sampled)}.key.prompt{background:var(--prompt)}.key.prefix{background:var(--prefix)}
.key.lonely{background:var(--lonely)}
summary{cursor:pointer;font-weight:600;margin:.6rem 0}
@media print{body{max-width:none}details{display:block}}
"""


def frame(title: str, parts: Sequence[str]) -> str:
    """The file's text. ``parts`` are HTML already."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>{chr(10).join(parts)}</body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = (), css: str = "") -> str:
    """Cells are HTML already. ``numbers``: which columns are right-aligned."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}{' class=n' if i in numbers else ''}>{cell}</{tag}>" for i, cell in enumerate(row))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{css}"><thead><tr>{cells(head, "th")}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def section(title: str, read: str, *content: str) -> str:
    """``title`` is text; ``read``, how to read what follows, and ``content`` are HTML already."""
    return f'<section><h2>{escape(title)}</h2><p class="read">{read}</p>{"".join(content)}</section>'


def picture(svg: str, caption: str = "") -> str:
    """An SVG under its caption, which is text."""
    named = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure>{named}<div class="scroll">{svg}</div></figure>'
