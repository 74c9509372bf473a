#!/usr/bin/env python3
"""The table of bench/xlora.sh: the mean of both tasks' losses a supervised token, and differences from controls with 95 % intervals: over rows (paired, of
the rows' mean losses over seeds) and over seeds (Student's, of what each seed gives).

usage: bench/xlora.py FOLDER [RESULTS.json]
"""
import json, math, pathlib, sys

folder = pathlib.Path(sys.argv[1])
TASKS = ["kind", "define"]


def seeds_of(*names):
    """Seeds for which all of these were measured."""
    own = lambda name: {int(path.name.split("-")[-3]) for path in folder.glob(f"{name}-*-on-define.json")}
    return sorted(set.intersection(*(own("kind" if name == "by name" else name) for name in names)))


def rows(name, task):
    return [json.loads(line) for line in open(folder / f"{name}-on-{task}.jsonl")]


def loss(name, task):
    return json.load(open(folder / f"{name}-on-{task}.json"))["loss"]


NAMES = ["kind", "define", "uniform", "bias", "shared", "layerwise", "depth2"]
runs = {(name, s): {task: loss(f"{name}-{s}", task) for task in TASKS} for name in NAMES for s in seeds_of(name)}
runs |= {("by name", s): {task: loss(f"{task}-{s}", task) for task in TASKS} for s in seeds_of("kind", "define")}
SHOWN = {"kind": "expert `kind`", "define": "expert `define`", "uniform": "uniform mixture", "bias": "one λ a projection (bias only)", "shared": "X-LoRA, one λ a token",
         "layerwise": "X-LoRA, depth 1, layerwise", "depth2": "X-LoRA, depth 2, layerwise", "by name": "each task its expert"}
mean = lambda values: sum(values) / len(values)


def student(values):
    n = len(values)
    if n < 2:
        return float("nan")
    spread = math.sqrt(sum((v - mean(values)) ** 2 for v in values) / (n - 1))
    return {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}[n] * spread / math.sqrt(n)


def share(name, seed, task):
    """What each row adds to its task's loss a token, so that the sum over rows is the loss."""
    source = f"{task if name == 'by name' else name}-{seed}"
    found = rows(source, task)
    total = sum(row["supervised_tokens"] for row in found)
    return [row["loss"] * row["supervised_tokens"] / total for row in found]


def paired(a, b, seeds):
    """Difference of the mean of both losses, and its half interval over rows."""
    centre, variance = 0.0, 0.0
    for task in TASKS:
        per_row = [mean([x - y for x, y in pairs]) for pairs in zip(*[list(zip(share(a, s, task), share(b, s, task))) for s in seeds])]
        n, m = len(per_row), mean(per_row)
        centre += sum(per_row) / 2
        variance += n * sum((d - m) ** 2 for d in per_row) / (n - 1) / 4
    return centre, 1.96 * math.sqrt(variance)


every = seeds_of("kind", "define", "uniform", "layerwise")
print("| | kind | define | mean of both |" + "".join(f" seed {s} |" for s in every))
print("|---|---|---|---|" + "---|" * len(every))
result = {}
for name, shown in SHOWN.items():
    own = [s for s in every if (name, s) in runs]
    if not own:
        continue
    both = {s: mean(list(runs[name, s].values())) for s in own}
    cells = [mean([runs[name, s][task] for s in own]) for task in TASKS] + [mean(list(both.values()))]
    print(f"| {shown} | " + " | ".join([f"{c:.4f}" for c in cells] + [f"{both[s]:.4f}" if s in both else "-" for s in every]) + " |")
    result[name] = {"mean": cells[2], "seeds": both, **{task: {s: runs[name, s][task] for s in own} for task in TASKS}}
print("\n| difference of the means | over rows | over seeds |\n|---|---|---|")
for a, b in [("layerwise", "kind"), ("layerwise", "define"), ("layerwise", "uniform"), ("layerwise", "bias"), ("layerwise", "by name"), ("bias", "uniform"),
             ("shared", "uniform"), ("shared", "layerwise"), ("depth2", "uniform"), ("depth2", "layerwise")]:
    own = [s for s in every if (a, s) in runs and (b, s) in runs]
    if not own:
        continue
    centre, half = paired(a, b, own)
    each = [result[a]["seeds"][s] - result[b]["seeds"][s] for s in own]
    over = f"{mean(each):+.4f} ± {student(each):.4f}" if len(own) > 1 else "one seed"
    print(f"| {SHOWN[a]} − {SHOWN[b]} | {centre:+.4f} ± {half:.4f} | {over} |")
    result.setdefault("differences", {})[f"{a} - {b}"] = {"seeds": dict(zip(own, each)), "difference": centre, "half_over_rows": half}
if len(sys.argv) > 2:
    pathlib.Path(sys.argv[2]).write_text(json.dumps(result, indent=1) + "\n")
