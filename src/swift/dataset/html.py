"""A page as one HTML file: styles and drawings inside, nothing is fetched, all data is escaped."""

from html import escape

from swift.dataset.blocks import Bars, Page, Shown, Table

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #66717d; --page: #f4f5f7; --card: #fff;
  --line: #e2e5e9; --accent: #1a7f4b; --trained: #d9f2e3; --warn: #7a4a00; --warn-page: #fff4dd }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --soft: #98a3af; --page: #14171b; --card: #1c2126;
    --line: #2e353d; --accent: #4cc38a; --trained: #163a29; --warn: #f3c46d; --warn-page: #2e2615 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.25rem 4rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1rem; margin: 0 0 .6rem } p { margin: .3rem 0 0 }
h1, h2, p, li, td { overflow-wrap: anywhere }
.soft, th, .note { color: var(--soft) } th, .note { font-size: .87rem } h2 .soft { font-weight: 400 }
section, .tiles div, .warnings { background: var(--card); border: 1px solid var(--line); border-radius: 10px }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0 }
.tiles div { flex: 1 1 9rem; padding: .8rem 1rem; color: var(--soft); font-size: .87rem; line-height: 1.35 }
.tiles b { display: block; font-size: 1.6rem; color: var(--ink); font-variant-numeric: tabular-nums }
.warnings { margin: 0 0 1.25rem; padding: .8rem 1rem .8rem 2.1rem; background: var(--warn-page);
  color: var(--warn) }
.grid { display: grid; gap: .75rem; grid-auto-flow: dense;
  grid-template-columns: repeat(auto-fill, minmax(min(30rem, 100%), 1fr)) }
section { padding: 1rem; min-width: 0 } .wide { grid-column: 1 / -1 }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 500 } td, th { padding: .25rem .9rem .25rem 0; vertical-align: top }
tr + tr td, thead + tbody td { border-top: 1px solid var(--line) }
.number { white-space: nowrap; text-align: right; width: 1% }
svg { display: block; width: 100%; height: auto } rect { fill: var(--accent) }
text { fill: var(--soft); font-size: 12px }
pre { margin: 0; max-height: 40rem; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  color: var(--soft); font: 13.5px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
mark { background: var(--trained); color: var(--ink); border-radius: 3px }
"""
_BAR_HEIGHT, _BAR_STEP, _BAR_LEFT, _BAR_WIDTH = 16, 22, 90, 300


def render_page(page: Page) -> str:
    """The whole file."""
    title = escape(page.title)
    warnings = "".join(f"<li>{escape(line)}</li>" for line in page.warnings)
    tiles = "".join(f"<div><b>{escape(number)}</b>{escape(what)}</div>" for number, what in page.tiles)
    blocks = "".join(_render_block(block) for block in page.blocks)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style></head>\n<body>\n"
        f'<h1>{title}</h1>\n<p class="soft">{escape(page.subtitle)}</p>\n'
        f'<div class="tiles">{tiles}</div>\n'
        + (f'<ul class="warnings">{warnings}</ul>\n' if warnings else "")
        + f'<main class="grid">\n{blocks}</main>\n</body></html>\n'
    )


def _render_block(block: Table | Bars | Shown) -> str:
    if isinstance(block, Bars):
        return f"<section><h2>{escape(block.title)}</h2>{_render_bars(block)}</section>\n"
    if isinstance(block, Table):
        kind = ' class="wide"' if "where" in block.header and block.rows else ""
        return f"<section{kind}><h2>{escape(block.title)}</h2>{_render_table(block)}</section>\n"
    pieces = "".join(_render_piece(*piece) for piece in block.pieces)
    title = f'{escape(block.title)} <span class="soft">· {escape(block.facts)}</span>'
    return f'<section class="wide"><h2>{title}</h2><pre>{pieces}</pre></section>\n'


def _render_piece(text: str, weight: float) -> str:
    if not weight:
        return escape(text)
    title = "" if weight == 1 else f' title="weight {weight:g}"'
    return f"<mark{title}>{escape(text)}</mark>"


def _render_table(table: Table) -> str:
    kinds = [
        ' class="number"' if all(map(_is_number, column)) else "" for column in zip(*table.rows, strict=True)
    ]

    def line(tag: str, words: tuple[str, ...]) -> str:
        cells = (f"<{tag}{kind}>{escape(word)}</{tag}>" for kind, word in zip(kinds, words, strict=True))
        return f"<tr>{''.join(cells)}</tr>"

    head = f"<thead>{line('th', table.header)}</thead>" if table.header and table.rows else ""
    body = "".join(line("td", row) for row in table.rows)
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (f"<table>{head}<tbody>{body}</tbody></table>" if table.rows else "") + note


def _is_number(word: str) -> bool:
    return word.replace(",", "").replace(".", "").isdecimal()


def _render_bars(bars: Bars) -> str:
    most = max(bars.bins.values())
    lines = []
    for i, (name, count) in enumerate(bars.bins.items()):
        y, width = i * _BAR_STEP, max(1 if count else 0, round(_BAR_WIDTH * count / most))
        lines.append(
            f'<text x="{_BAR_LEFT - 8}" y="{y + 12}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="{_BAR_LEFT}" y="{y}" width="{width}" height="{_BAR_HEIGHT}" rx="2"></rect>'
            f'<text x="{_BAR_LEFT + width + 6}" y="{y + 12}">{count:,}</text>'
        )
    height = len(bars.bins) * _BAR_STEP + 14
    unit = f'<text x="{_BAR_LEFT}" y="{height - 4}">{escape(bars.unit)} (left), how many (bars)</text>'
    label = escape(
        f"{bars.title}: " + ", ".join(f"{name}: {count}" for name, count in bars.bins.items()), quote=True
    )
    return f'<svg viewBox="0 0 460 {height}" role="img" aria-label="{label}">{"".join(lines)}{unit}</svg>'
