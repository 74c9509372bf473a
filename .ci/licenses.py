#!/usr/bin/env python3
"""Refuses crates whose licence is not in the list of deny.toml. Read are the crates of this machine's build, so that nothing is fetched that the
build has not fetched; cargo-deny, where it is installed, looks at those of all platforms.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def allowed():
    """The licences of deny.toml."""
    text = re.sub(r"#.*", "", (ROOT / "deny.toml").read_text())
    return set(re.findall(r'"([^"]+)"', re.search(r"(?ms)^\[licenses\].*?^allow = \[(.*?)\]", text).group(1)))


def holds(expression, licences):
    """Whether an SPDX expression (or an older `A/B`) can be fulfilled with some licences."""
    tokens = re.findall(r"[()]|[\w.+-]+(?:\s+WITH\s+[\w.-]+)?", expression.replace("/", " OR "))
    words = {"AND": "and", "OR": "or", "(": "(", ")": ")"}
    return eval(" ".join(words.get(t) or str(t in licences) for t in tokens))  # of True, False, and, or, parentheses


def main():
    host = re.search(r"(?m)^host: (\S+)", subprocess.check_output(["rustc", "-vV"], text=True)).group(1)
    command = ["cargo", "metadata", "--locked", "--format-version", "1", "--filter-platform", host]
    packages = json.loads(subprocess.check_output(command, cwd=ROOT))["packages"]
    licences = allowed()
    bad = [p for p in packages if not (p["license"] and holds(p["license"], licences))]
    for p in bad:
        print(f"{p['name']} {p['version']}: the licence `{p['license']}` is not in deny.toml", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
