"""The pages for people: README, CONTRIBUTING and docs/. Their links, examples and vocabulary."""

import re
import runpy
from pathlib import Path

import pytest

from tests.support import ROOT

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def links(page: Path) -> list[tuple[Path, str]]:
    """The file and the anchor ("" for none) of each link to something in the repository."""
    targets = [link.partition("#") for link in LINK.findall(page.read_text(encoding="utf-8"))]
    local = [(name, anchor) for name, _, anchor in targets if not name.startswith("http")]
    return [((page.parent / name if name else page).resolve(), anchor) for name, anchor in local]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    """Guards moved files and renamed headings."""
    for target, anchor in links(page):
        assert target.exists(), f"{page.name} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(target), f"{page.name}: {target.name}#{anchor}"


def test_readme_is_short_and_leads_everywhere():
    """Guards a README that grows, and pages that nobody finds: each is one click away."""
    assert README.read_text(encoding="utf-8").count("\n") <= 150
    targets = {target for target, _ in links(README)}
    assert targets >= {page.resolve() for page in PAGES[1:]}


def test_readme_calls_a_kernel(tmp_path):
    """Guards the README's code: it runs as it is, and its own comparison with eager holds."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        script = tmp_path / "block.py"
        script.write_text(block, encoding="utf-8")
        runpy.run_path(str(script))


def test_terms_are_defined_once():
    """Guards the glossary's promise: one meaning per word."""
    glossary = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \|[^|]*\|$", glossary, re.MULTILINE)
    terms = [term.strip() for row in rows for term in row.split(", ") if term != "term"]
    assert len(terms) > 50
    assert sorted(terms) == sorted(set(terms))
