"""What bench/routed.sh measured: means over seeds, and paired differences with 95 % intervals over seeds (Student's t). usage: bench/routed.py FOLDER"""

import json
import math
import sys
from pathlib import Path

TASKS = ["sentiment-movies", "wordnet-define"]
# Student's t for 95 % at 1, 2, ... degrees of freedom.
T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]
folder = Path(sys.argv[1])


def loss(name, seed, task):
    return json.loads((folder / f"{name}-{seed}-on-{task}.json").read_text())["loss"]


def both(name, seed):
    return sum(loss(name, seed, task) for task in TASKS) / len(TASKS)


def interval(values):
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return f"{mean:+.3f}"
    half = T[n - 2] * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def done(names):
    """Seeds for which all of these were measured on both tasks."""
    found = {int(p.name.split("-on-")[0].rsplit("-", 1)[1]) for p in folder.glob("*-on-*.json")}
    return sorted(s for s in found if all((folder / f"{n}-{s}-on-{t}.json").exists() for n in names for t in TASKS))


def table(names):
    seeds = done(names)
    print(f"seeds {seeds}; mean of the two tasks' losses a supervised token")
    for name in names if seeds else []:
        values = [both(name, s) for s in seeds]
        print(f"{name:<14}" + "".join(f"{v:8.3f}" for v in values) + f"   mean {sum(values) / len(values):.3f}")
    return seeds


def rise(name, seed):
    return both(f"{name}-average", seed) - both(name, seed)


seeds = table(["fly", "fly-average", "lora", "lora-average"])
if seeds:
    print("rise by averaging, FlyLoRA less LoRA:      ", interval([rise("fly", s) - rise("lora", s) for s in seeds]))
seeds = table(["smora-1", "smora-8", "smora-fixed", "lora-mixed"])
if seeds:
    print("SMoRA partition 1 less partition 8:        ", interval([both("smora-1", s) - both("smora-8", s) for s in seeds]))
    print("SMoRA less the router that stays:          ", interval([both("smora-1", s) - both("smora-fixed", s) for s in seeds]))
    print("SMoRA less LoRA of rank 64 on the mixture: ", interval([both("smora-1", s) - both("lora-mixed", s) for s in seeds]))
