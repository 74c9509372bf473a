#!/usr/bin/env python3
"""Refuses circles between files of a crate: if `a.rs` imports from `b.rs`, `b.rs` does not import from `a.rs`, directly or by way of others.

Read are `use` declarations and paths in the code (`crate::a::f`, `super::f`, and `child::f` where `child` is declared in the file). What a file
only declares (`mod`) or only passes on (`pub use`) is no import; a path is followed through what is passed on to the file that has the item.
Comments and tests (`#[cfg(test)]`) are left out. With `--list` every import is printed too.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Circles that are known and wait for somebody: the files of one, from the crate's `src`, in the order of their names.
ALLOWED = {}

TOKEN = re.compile(
    r"""//[^\n]*|/\*.*?\*/|b?r(?P<h>\#*)".*?"(?P=h)|b?"(?:\\.|[^"\\])*"|'(?:\\.[^']*|[^'\\])'""", re.S
)
USE = re.compile(r"(?m)^[ \t]*(?P<public>pub(?:\([^)]*\))?[ \t]+)?use\s+(?P<tree>[^;]+);")
PATH = re.compile(r"(?<![\w:])(?:r#)?[a-z_]\w*(?:::\w+)+")


def plain(text):
    """The text without comments, strings and tests."""
    text = TOKEN.sub(lambda m: " " if m.group(0).startswith("/") else '""', text)
    while found := re.search(r"#\[cfg\((?:all\()?test\b[^\]]*\][^;{]*?([;{])", text):
        end = found.end()
        depth = 1 if found.group(1) == "{" else 0
        while depth and end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        text = text[: found.start()] + text[end:]
    return text


def leaves(tree, prefix=()):
    """Paths of a `use` tree, each with the name that it has from then on."""
    tree = tree.strip()
    if brace := re.fullmatch(r"((?:\w+\s*::\s*)*)\{(.*)\}", tree, re.S):
        prefix = (*prefix, *re.findall(r"\w+", brace.group(1)))
        part, depth = "", 0
        for letter in brace.group(2) + ",":
            depth += {"{": 1, "}": -1}.get(letter, 0)
            if letter == "," and depth == 0:
                if part.strip():
                    yield from leaves(part, prefix)
                part = ""
            else:
                part += letter
        return
    path, _, name = (p.strip() for p in tree.partition(" as "))
    path = (*prefix, *re.findall(r"\w+|\*", path))
    if path[-1] == "self":
        path = path[:-1]
    yield path, name or path[-1]


class File:
    def __init__(self, path, module):
        self.path, self.module = path, module
        text = plain(path.read_text())
        self.children = set(re.findall(r"(?m)^\s*(?:pub(?:\([^)]*\))?\s+)?mod\s+(\w+)\s*;", text))
        self.uses = [(path, name, bool(u["public"])) for u in USE.finditer(text) for path, name in leaves(u["tree"])]
        self.body = USE.sub("", text)
        self.passed_on = {name: self.absolute(path) for path, name, public in self.uses if public}

    def absolute(self, path):
        """The path from the crate's root, or nothing if it leads out of the crate."""
        if path[0] == "crate":
            return path[1:]
        if path[0] in ("self", "super"):
            here = self.module
            while path and path[0] in ("self", "super"):
                here = here[:-1] if path[0] == "super" else here
                path = path[1:]
            return (*here, *path)
        return (*self.module, *path) if path[0] in self.children else None

    def paths(self):
        for path, name, public in self.uses:
            if not public or re.search(rf"\b{re.escape(name)}\b", self.body):
                yield path
        for found in PATH.finditer(self.body):
            yield tuple(found.group(0).split("::"))


def owner(files, path, depth=0):
    """The file that has what a path leads to."""
    for length in range(len(path), -1, -1):
        if file := files.get(path[:length]):
            further = file.passed_on.get(path[length]) if length < len(path) else None
            if further is None and length < len(path) and (star := file.passed_on.get("*")):
                further = (*star[:-1], path[length])
            if further and depth < 8:
                return owner(files, (*further, *path[length + 1 :]), depth + 1)
            return file
    return None


def imports(source):
    """What each file of a crate imports from."""
    files = {}
    for path in sorted(source.rglob("*.rs")):
        module = path.relative_to(source).with_suffix("").parts
        module = module[:-1] if module[-1] in ("mod", "lib", "main") else module
        if path == source / "main.rs" and (source / "lib.rs").exists():
            continue
        files[module] = File(path, module)
    graph = {}
    for file in files.values():
        found = (file.absolute(p) for p in file.paths())
        graph[file.path] = {o.path for p in found if p is not None and (o := owner(files, p)) and o is not file}
    return graph


def circles(graph):
    """Groups of files that reach each other (Tarjan)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def main():
    bad = False
    for crate in sorted((ROOT / "crates").iterdir()):
        source = crate / "src"
        graph = imports(source)
        name = lambda path: str(path.relative_to(source))
        if "--list" in sys.argv:
            for path in sorted(graph):
                for other in sorted(graph[path]):
                    print(f"{crate.name}: {name(path)} -> {name(other)}")
        allowed = [sorted(c) for c in ALLOWED.get(crate.name, [])]
        for circle in circles(graph):
            if sorted(map(name, circle)) in allowed:
                continue
            bad = True
            print(f"{crate.name}: a circle of {len(circle)} files", file=sys.stderr)
            for path in circle:
                inside = sorted(name(o) for o in graph[path] if o in circle)
                print(f"  {name(path)} imports from {', '.join(inside)}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
