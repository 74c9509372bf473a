"""The Python examples of the READMEs, run as they stand, where the base is there or can be fetched. Run by check.py."""

import pathlib
import re
import shutil
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]

for readme in (ROOT / "README.md", ROOT / "crates" / "lorimer-python" / "README.md"):
    examples = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    examples = [example for example in examples if "import lorimer" in example]
    assert examples, f"{readme} has no example of the package"
    for example in examples:
        for folder in set(re.findall(r"runs/[a-z-]+", example)):
            shutil.rmtree(ROOT / folder, ignore_errors=True)
        exec(compile(example, str(readme), "exec"), {})
