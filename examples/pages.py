"""Tables for the pages in docs/, whose figures nobody types."""

import copy
import io
import re

from rich import box
from rich.console import Console


def markdown(table):
    """A rich table, its title and its caption as Markdown."""
    plain, text = copy.copy(table), io.StringIO()
    plain.title, plain.caption, plain.box = None, None, box.MARKDOWN
    Console(file=text, width=2000).print(plain)  # wider than any row: a wrapped cell would be two rows
    rows = "\n".join(filter(None, map(str.strip, text.getvalue().splitlines())))
    return "\n\n".join(filter(None, (table.title, rows, table.caption)))


def with_block(text, name, block, page):
    """The text of a page with a block between <!-- name --> and <!-- /name -->."""
    between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    new, found = between.subn(lambda m: f"{m[1]}{block}\n{m[2]}", text)
    if found != 1:
        raise ValueError(f"{page} must have the lines <!-- {name} --> and <!-- /{name} --> once")
    return new


def write_table(page, name, table):
    """Write a rich table between the markers of its name in a page."""
    page.write_text(with_block(page.read_text(), name, markdown(table), page))
