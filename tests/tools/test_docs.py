"""README and site: their code runs, the files that they and the sources name exist, their figures are those of the records."""

import json
import re
import textwrap
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from bench import figures, report

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = {".md", ".py", ".cu", ".cuh", ".cpp", ".h"}
CODE = re.compile(r"^( *)```python\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def code_of(page):
    """The Python blocks of a page, one after the other, as a reader would run them."""
    return "\n".join(textwrap.dedent(block) for _, block in CODE.findall(page.read_text()))


def name_of(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page)], ids=name_of)
def test_code_of_a_page_runs(page):
    torch.manual_seed(0)
    precision = torch.backends.cuda.matmul.fp32_precision
    try:
        exec(compile(code_of(page), name_of(page), "exec"), {"__name__": "page"})
    finally:  # a page shows how to set it
        torch.backends.cuda.matmul.fp32_precision = precision


def test_most_pages_for_users_have_code():
    tutorials = sorted((ROOT / "docs/tutorials").glob("*.md"))
    assert tutorials and all(code_of(page) for page in [ROOT / "README.md", *tutorials])


def named_in_the_repository(pattern):
    """{what matches: names of the files that it stands in}, in sources, comments and pages."""
    folders = ("csrc", "python", "triton_kernels", "tests", "bench", "examples", "docs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in SOURCES]
    found = {}
    for path in (*files, *ROOT.glob("*.md"), ROOT / "python/nearfar/runtime/choices.json"):
        for match in re.findall(pattern, path.read_text()):
            found.setdefault(match, []).append(name_of(path))
    return found


def test_pages_named_in_the_repository_exist():
    """mkdocs --strict checks the site's own links; here comments, docstrings, README and CONTRIBUTING."""
    named = named_in_the_repository(r"\bdocs/[\w/-]+\.(?:md|svg)")
    missing = {page: files for page, files in named.items() if not (ROOT / page).exists()}
    assert not missing, missing


def test_tests_named_in_the_repository_exist():
    named = named_in_the_repository(r"\btests/[\w/*-]+\.py\b")
    missing = {path: files for path, files in named.items() if not any(ROOT.glob(path))}
    assert not missing, missing


def test_logs_of_development_are_cited_and_exist():
    """A log is kept for a page, comment or record that cites it, by a name of date and topic."""
    dated = r"\b\d{4}-\d\d-\d\d-[a-z0-9-]+\.(?:log|json)\b"
    kept = [path.name for path in ROOT.glob("bench/results/*/development/**/*") if path.is_file()]
    assert len(kept) == len(set(kept)) and all(re.fullmatch(dated, name) for name in kept)
    cited = named_in_the_repository(dated)
    assert set(kept) <= set(cited), sorted(set(kept) - set(cited))
    missing = {name: files for name, files in cited.items() if name not in kept}
    assert not missing, missing
    undated = named_in_the_repository(r"\bdevelopment/(?!\d{4}-)\w[\w./-]*")
    assert not undated, undated


def test_readme_is_short_and_its_links_exist():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_readme_has_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert "`make test`" in text and "`make bench`" in text


def test_tables_are_those_of_the_records():
    assert report.main(["--check"]) == 0


def test_times_stand_in_generated_blocks():
    """README has no time, rate or ratio outside them."""
    text = report.MARKERS.sub("", (ROOT / "README.md").read_text())
    assert not re.findall(r"\d[\d.,]*\s?(?:ms|us|GB/s|TFLOP/s|tokens/s|x\b|times)", text)


def test_the_figure_shows_the_records():
    root = ElementTree.parse(ROOT / "docs/assets/length.svg").getroot()
    (shown,) = root.iter("{http://purl.org/dc/elements/1.1/}description")
    assert json.loads(shown.text) == json.loads(figures.description(figures.panels()))
    for lines in json.loads(shown.text).values():
        assert len(lines) >= 3 and all(len(points) >= 8 for points in lines.values())


def test_weights_of_the_other_figure_are_weights():
    for name, _, row in figures.weights():
        assert sum(row) == pytest.approx(1, abs=1e-4), name  # affine: 0.5 of softmax, and 32 times 0.5 / 32
        assert min(row) >= 0
