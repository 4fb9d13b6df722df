"""What `swift dataset` shows, as records, and how a terminal or page.html.jinja shows them.

A screen that is no terminal gets plain lines: no colours, no borders, trained text between TRAINED marks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader
from rich.console import Console
from rich.panel import Panel
from rich.table import Table as RichTable
from rich.text import Text

from swift.dataset.measure import Inspection, Reason

TRAINED = ("⟦", "⟧")
_BAR = 40  # characters of the longest bar
_ENDS = 1_000  # characters shown of both ends of a long piece


@dataclass(frozen=True)
class Table:
    """Rows of words under a header; the header may be empty."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""

    @property
    def is_numeric(self) -> list[bool]:
        """Whether a column holds numbers alone."""
        columns = zip(*self.rows, strict=True)
        return [all(w.replace(",", "").replace(".", "").isdecimal() for w in column) for column in columns]


@dataclass(frozen=True)
class Bars:
    """A histogram: bins by name."""

    title: str
    bins: dict[str, int]
    unit: str


@dataclass(frozen=True)
class Shown:
    """One row as the model sees it: pieces of its text with the weight of their loss, 0 = not trained."""

    title: str
    facts: str
    pieces: list[tuple[str, float]]


@dataclass(frozen=True)
class Page:
    title: str
    subtitle: str
    tiles: list[tuple[str, str]]  # (number, what it counts)
    warnings: list[str]
    blocks: Sequence[Table | Bars | Shown]


def inspection_page(found: Inspection, title: str, subtitle: str) -> Page:
    tokens = found.tokens
    tiles = [
        (f"{found.kept:,}", f"rows kept of {found.rows:,}"),
        (f"{tokens['total']:,}", "tokens"),
        (f"{100 * found.trained_share:.0f} %", "of them trained"),
        (f"{tokens['max']:,}", "tokens in the longest row"),
        (f"{found.median_answer:g}", "tokens in the median answer"),
    ]
    lengths = [(name, f"{value:,}") for name, value in tokens.items()]
    blocks: list[Table | Bars] = [
        Table("Rows read", ("file", "rows"), [(name, f"{n:,}") for name, n in found.sources.items()]),
        _reasons("Rows dropped", found.dropped, "every row can be used"),
        Table("Tokens", (), lengths, "mean, p50, p95 and max are of one row"),
        Table(
            f"Longer than --max_length {found.max_length:,}: {found.too_long.count:,} rows",
            ("truncation", "rows dropped", "tokens lost", "trained tokens lost"),
            [
                (t.strategy, f"{t.rows_dropped:,}", f"{t.tokens_lost:,}", f"{t.trained_tokens_lost:,}")
                for t in found.truncation
                if found.too_long.count
            ],
            _first(found.too_long) or "every row fits",
        ),
        Bars("Questions", found.question_lengths, "tokens"),
        Bars("Answers, as trained", found.answer_lengths, "tokens"),
        Bars("Whole rows", found.row_lengths, "tokens"),
        Bars("Answers in a conversation", found.turns, "answers"),
        _reasons("Duplicates", [r for r in (found.copies, found.near_duplicates) if r and r.count], "none"),
        _reasons("Answers that many questions get", found.repeated_answers, "none"),
        _reasons(
            "Ends",
            [r for r in (found.unended, found.ends_with_question, found.empty_answers) if r.count],
            "every row ends with an answer and a trained end-of-turn token",
        ),
        Table(
            "Thoughts (<think>) in last answers", (), [(kind, f"{n:,}") for kind, n in found.thoughts.items()]
        ),
    ]  # fmt: skip
    return Page(
        title, subtitle, tiles, found.warnings, [b for b in blocks if not isinstance(b, Bars) or b.bins]
    )


def _reasons(title: str, reasons: list[Reason], otherwise: str) -> Table:
    rows = [(f"{r.count:,}", r.reason, _first(r)) for r in reasons]
    return Table(title, ("rows", "what", "where"), rows, "" if rows else otherwise)


def _first(reason: Reason) -> str:
    more = f" and {reason.count - len(reason.places):,} more" if reason.count > len(reason.places) else ""
    return ", ".join(reason.places) + more


def print_page(page: Page, screen: Console) -> None:
    """Shows a page on a terminal, or as plain lines."""
    screen.print(Text(page.title, style="bold"), Text(page.subtitle, style="dim"), sep="\n")
    for number, what in page.tiles:
        screen.print(Text(f"  {number:>12} {what}"))
    for line in page.warnings:
        screen.print(Text(f"warning: {line}", style="yellow"))
    for block in page.blocks:
        screen.print()
        if isinstance(block, Shown):
            _print_shown(block, screen)
            continue
        screen.print(Text(block.title, style="bold"))
        if isinstance(block, Bars):
            _print_bars(block, screen)
        else:
            _print_table(block, screen)


def render_page(page: Page) -> str:
    """A page as one HTML file. All data is escaped, and nothing is fetched."""
    loader = PackageLoader("swift.dataset", "")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("page.html.jinja").render(page=page)


def _print_table(table: Table, screen: Console) -> None:
    if table.rows:
        grid = RichTable(box=None, show_header=bool(table.header), header_style="dim", padding=(0, 2, 0, 0))
        columns = len(table.rows[0])
        for name in table.header or ("",) * columns:
            grid.add_column(name, justify="right" if name == "rows" else "left", overflow="fold")
        for row in table.rows:
            grid.add_row(*(Text(_visible(word)) for word in row))
        screen.print(grid)
    if table.note:
        screen.print(Text(f"  {table.note}", style="dim"))


def _print_bars(bars: Bars, screen: Console) -> None:
    most = max(bars.bins.values())
    width = max(map(len, bars.bins))
    for name, count in bars.bins.items():
        length = -(-count * _BAR // most)
        line = Text(f"  {name:>{width}} ")
        line.append("█" * length if screen.encoding.startswith("utf") else "#" * length, style="green")
        screen.print(line.append(f" {count:,}"))


def _print_shown(shown: Shown, screen: Console) -> None:
    if screen.is_terminal:
        text = Text()
        for piece, weight in shown.pieces:
            text.append(_short(piece), style="bold green" if weight else "dim")
        title = Text(f"{shown.title} · {shown.facts}")
        screen.print(Panel(text, title=title, title_align="left", border_style="dim"))
        return
    screen.print(Text(f"{shown.title} · {shown.facts}"))
    opening, closing = TRAINED
    marked = (
        f"{opening}{_short(piece)}{closing}" if weight else _short(piece) for piece, weight in shown.pieces
    )
    screen.print(Text("".join(marked)), soft_wrap=True)


def _short(piece: str) -> str:
    """A screen is no place for a book; the HTML page has the rest."""
    if len(piece) > 2 * _ENDS:
        piece = f"{piece[:_ENDS]} … {len(piece) - 2 * _ENDS:,} characters … {piece[-_ENDS:]}"
    return _visible(piece)


def _visible(text: str) -> str:
    """Data must not steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
