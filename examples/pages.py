"""Tables for the pages in docs/, whose figures nobody types."""

import copy
import io
import re

from rich import box
from rich.console import Console


def write_table(page, name, table):
    """Write a rich table, its title and its caption as Markdown between <!-- name --> and <!-- /name --> of a page."""
    plain, text = copy.copy(table), io.StringIO()
    plain.title, plain.caption, plain.box = None, None, box.MARKDOWN
    Console(file=text, width=300).print(plain)
    rows = "\n".join(filter(None, map(str.strip, text.getvalue().splitlines())))
    block = "\n\n".join(filter(None, (table.title, rows, table.caption)))
    old = page.read_text()
    new, found = re.subn(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: f"{m[1]}{block}\n{m[2]}", old, flags=re.DOTALL)
    if found != 1:
        raise ValueError(f"{page} must have the lines <!-- {name} --> and <!-- /{name} --> once")
    page.write_text(new)
