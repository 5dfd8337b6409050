"""`hf-scratch-gpt inspect`: what happens to a text in a model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.columns import Columns
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..messages import printable

if TYPE_CHECKING:
    from ..inspection import Block, Inspection

# Of a long text, the terminal shows so many tokens.
_SHOWN_TOKENS = 24
_BAR = 24


def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a causal language model.")
    ],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The text to look at.")],
    top: Annotated[int, typer.Option(help="How many of the likeliest next tokens.")] = 10,
    html: Annotated[
        str | None,
        typer.Option(metavar="<path>", help="Write a page with the attention of each head, too."),
    ] = None,
) -> None:
    """Show what happens to a text in a model.

    Its tokens, the blocks that it passes, its shape before and after each, and the likeliest next
    tokens.
    """
    from ..inspection import inspect as look
    from ..inspection import write_page
    from .models import load

    if top < 1:
        raise ValueError(f"--top {top} is below 1; ask for at least one token")
    page = None if html is None else Path(html)
    if page is not None and (page.is_dir() or not page.parent.is_dir()):
        raise ValueError(f"--html {html} is not a file in a folder that exists; give another")
    network, tokenizer = load(model)
    seen = look(network, tokenizer, text, top)
    if page is not None:
        write_page(seen, page)
    console = Console(highlight=False, markup=False)
    console.print(f"Tokens and their ids ({len(seen.ids)}):")
    console.print(_tokens(seen))
    console.print()
    console.print(_tree(seen.blocks))
    console.print()
    console.print(_likeliest(seen))
    if page is not None:
        console.print(f"The page is {printable(str(page.resolve()))}", soft_wrap=True)


def _tokens(seen: "Inspection") -> Columns:
    pairs = list(zip(seen.tokens, seen.ids, strict=True))
    cells = [
        Text(repr(token), style="cyan").append(f" {id_}", style="dim")
        for token, id_ in pairs[:_SHOWN_TOKENS]
    ]
    if pairs[_SHOWN_TOKENS:]:
        cells.append(Text(f"and {len(pairs) - _SHOWN_TOKENS} more"))
    return Columns(cells, padding=(0, 2))


def _table(*numbers: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column(numbers[0], overflow="fold")
    for name in numbers[1:]:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _tree(blocks: "list[Block]") -> Table:
    table = _table("block", "in", "out", "parameters", "storage")
    for place, block in enumerate(blocks):
        name = Text(_guides(blocks, place), style="dim").append(block.name, style="not dim")
        count = f"{block.parameters:,}" if block.parameters else ""
        table.add_row(
            name,
            _shape(block.input),
            _shape(block.output),
            "shared" if block.is_shared else count,
            _bytes(block.storage) if count and not block.is_shared else "",
        )
    return table


def _guides(blocks: "list[Block]", place: int) -> str:
    """The branches of a tree that lead to a block."""
    guides = ""
    for depth in range(1, blocks[place].depth + 1):
        after = next((b.depth for b in blocks[place + 1 :] if b.depth <= depth), 0)
        is_own = depth == blocks[place].depth
        guides += ("├ " if is_own else "│ ") if after == depth else ("└ " if is_own else "  ")
    return guides


def _shape(sizes: tuple[int, ...] | None) -> str:
    return "×".join(map(str, sizes)) if sizes else ""


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:,.{0 if unit == 'B' else 1}f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"


def _likeliest(seen: "Inspection") -> Table:
    table = _table("likeliest next", "id", "probability")
    table.add_column("")
    likeliest = seen.likeliest[-1]
    for token in likeliest:
        bar = "━" * round(_BAR * token.probability / likeliest[0].probability)
        table.add_row(
            Text(repr(token.token), style="cyan"),
            str(token.id),
            f"{100 * token.probability:.2f} %",
            Text(bar, style="green"),
        )
    return table
