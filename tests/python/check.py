"""The Python package as its users have it: a wheel, installed in a fresh virtual environment.

    python3 tests/python/check.py LORIMER [WHEEL]

LORIMER is the program, whose results the package's are held to. Without WHEEL it is built here with maturin. With PEFT in the environment of this
interpreter (`--peft`) adapters go to and from PEFT's models too.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
PIP = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]


def main() -> None:
    peft = "--peft" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--peft"]
    program = pathlib.Path(arguments[0]).resolve()
    with tempfile.TemporaryDirectory() as work:
        wheel = pathlib.Path(arguments[1]).resolve() if len(arguments) > 1 else build(pathlib.Path(work))
        if peft:
            site = pathlib.Path(work) / "site"
            subprocess.run([*PIP, "--target", site, "--no-deps", wheel], check=True)
            run("peft_models.py", sys.executable, program, work, dict(os.environ, PYTHONPATH=str(site)))
        else:
            environment = pathlib.Path(work) / "venv"
            subprocess.run([sys.executable, "-m", "venv", environment], check=True)
            python = environment / "bin" / "python"
            alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            subprocess.run([python, *PIP[1:], wheel, "numpy"], check=True, env=alone)
            for test in ("package.py", "readme.py"):
                run(test, python, program, work, alone)
    print("the Python package does what its tests ask")


def run(test, python, program, work, environment) -> None:
    subprocess.run([python, ROOT / "tests" / "python" / test, program, pathlib.Path(work) / "work"], check=True, cwd=ROOT, env=environment)


def build(work: pathlib.Path) -> pathlib.Path:
    """The wheel, out of what the workspace's build has left."""
    maturin = shutil.which("maturin")
    command = [maturin] if maturin else [sys.executable, "-m", "maturin"]
    manifest = ROOT / "crates" / "lorimer-python" / "Cargo.toml"
    subprocess.run([*command, "build", "--release", "--locked", "-m", manifest, "-o", work, "--compatibility", "linux"], check=True)
    (wheel,) = work.glob("*.whl")
    return wheel


if __name__ == "__main__":
    main()
