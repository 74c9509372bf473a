#!/usr/bin/env python3
"""Checks the documentation without mdbook: every link of docs/SUMMARY.md leads to a page, every page of docs/ is in it once, pages link to nothing
outside docs/ (which the book does not hold), and every relative link of docs/ and of the files in the root resolves, its heading included. And that no
crate has examples in its documentation, or unit tests, which its Cargo.toml keeps from being run.
"""

import re
import sys
import tomllib
import unicodedata
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^()\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")


def prose(path):
    """A page's text without blocks of code, and without code that looks like a link."""
    text = re.sub(r"(?ms)^\s*(```+|~~~+).*?^\s*\1\s*$", "", path.read_text())
    return re.sub(r"(`+)(?!`)(?:(?!\n\n).)+?(?<!`)\1(?!`)", lambda m: m.group(0).replace("](", "] ("), text, flags=re.S)


def anchors(path):
    """Names of a page's headings, as GitHub and mdbook make them."""
    found = Counter()
    names = set()
    for heading in re.findall(r"(?m)^#{1,6}\s+(.*?)\s*#*$", prose(path)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = "".join(c for c in plain.replace(" ", "-") if c in "-_" or unicodedata.category(c)[0] in "LN")
        names.add(f"{name}-{found[name]}" if found[name] else name)
        found[name] += 1
    return names


def untested():
    """Sources that hold what their crate's Cargo.toml says is not there."""
    for manifest in sorted(ROOT.glob("crates/*/Cargo.toml")):
        said = tomllib.loads(manifest.read_text())
        library = said.get("lib", {})
        for key, mark, what in [("doctest", r"(?m)^\s*//[/!] ```", "an example"), ("test", r"(?m)^\s*#\[test\]", "a unit test")]:
            if library.get(key, True):
                continue
            for source in sorted((manifest.parent / "src").rglob("*.rs")):
                if re.search(mark, source.read_text()):
                    yield f"{source.relative_to(ROOT)} has {what}, which `{key} = false` in {manifest.relative_to(ROOT)} keeps from being run"


def main():
    problems = list(untested())
    pages = sorted(p for p in DOCS.rglob("*.md") if p.name != "SUMMARY.md")
    listed = Counter((DOCS / link).resolve() for link in LINK.findall(prose(DOCS / "SUMMARY.md")))
    for page, times in listed.items():
        if times > 1:
            problems.append(f"docs/SUMMARY.md names {page.relative_to(ROOT)} {times} times")
    problems += [f"docs/SUMMARY.md lacks {p.relative_to(ROOT)}" for p in pages if p not in listed]
    for page in [*sorted(ROOT.glob("*.md")), DOCS / "SUMMARY.md", *pages]:
        for link in LINK.findall(prose(page)):
            if re.match(r"[a-z][a-z0-9+.-]*:", link):
                continue
            path, _, heading = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            where = f"{page.relative_to(ROOT)}: `{link}`"
            if not target.is_relative_to(ROOT) or not target.exists():
                problems.append(f"{where} leads nowhere")
            elif page.is_relative_to(DOCS) and not target.is_relative_to(DOCS):
                problems.append(f"{where} leads out of docs/, where the book ends")
            elif heading and target.suffix == ".md" and heading not in anchors(target):
                problems.append(f"{where} names no heading of {target.relative_to(ROOT)}")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
