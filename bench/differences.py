#!/usr/bin/env python3
"""What a comparison's runs say against one of its lines: paired differences on the same task and seed, their means over tasks and 95 % intervals.

usage: bench/differences.py bench/results/methods [LINE]        (LINE: `lora` unless given)

A task's seeds are averaged first, so that the interval is Student's over tasks: what holds on other tasks like these. Loss is compared as a ratio.
"""
import json, math, pathlib, sys
from statistics import mean, stdev

# Student's t, two-sided 95 %, by degrees of freedom.
T = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23]
folder, against = pathlib.Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "lora"
runs = {}
for path in sorted(folder.glob("runs/run-*.json")):
    run = json.loads(path.read_text())
    task, name = run["spec"]["task"]["name"], path.name.removeprefix("run-")
    line = name.removeprefix(task + "-").rsplit("-lr", 1)[0]
    if run["loss"] is not None:
        runs[line, task, run["spec"]["seed"]] = run


def interval(values, show):
    if len(values) < 2:
        return show(mean(values)) if values else "-"
    half = T[min(len(values), len(T) + 1) - 2] * stdev(values) / math.sqrt(len(values))
    return f"{show(mean(values))} [{show(mean(values) - half)}, {show(mean(values) + half)}]"


print("| method | loss, % | accuracy, points | forgetting | lower loss in |\n|---|---|---|---|---|")
for line in dict.fromkeys(line for line, _, _ in runs):
    pairs = {}
    for (name, task, seed), run in runs.items():
        other = runs.get((against, task, seed))
        if name == line and line not in (against, "base") and other:
            pairs.setdefault(task, []).append((run, other))
    if not pairs:
        continue
    by_task = lambda of: [mean(of(a, b) for a, b in some) for some in pairs.values()]
    loss = by_task(lambda a, b: math.log(a["loss"] / b["loss"]))
    accuracy = by_task(lambda a, b: a["accuracy"] - b["accuracy"])
    forgot = by_task(lambda a, b: a["general_loss"] - b["general_loss"]) if all(a["general_loss"] for s in pairs.values() for a, _ in s) else []
    every = [a["loss"] < b["loss"] for some in pairs.values() for a, b in some]
    cells = interval(loss, lambda v: f"{100 * math.expm1(v):+.1f}"), interval(accuracy, lambda v: f"{100 * v:+.1f}"), interval(forgot, lambda v: f"{v:+.2f}")
    print(f"| {line} | {' | '.join(cells)} | {sum(every)} of {len(every)} |")
