#!/usr/bin/env python3
"""The table of bench/xlora.sh: the mean of both tasks' losses a supervised token, and differences from controls with 95 % intervals: over rows (paired, of
the rows' mean losses over seeds) and over seeds (Student's, of what each seed gives).

usage: bench/xlora.py FOLDER [RESULTS.json]
"""
import json, math, pathlib, sys

folder = pathlib.Path(sys.argv[1])
TASKS = ["kind", "define"]
seeds = sorted({int(path.name.split("-")[1]) for path in folder.glob("uniform-*-on-define.json")})
seeds = [s for s in seeds if (folder / f"depth2-{s}-on-define.json").exists()]


def rows(name, task):
    return [json.loads(line) for line in open(folder / f"{name}-on-{task}.jsonl")]


def loss(name, task):
    return json.load(open(folder / f"{name}-on-{task}.json"))["loss"]


NAMES = ["kind", "define", "uniform", "bias", "shared", "layerwise", "depth2"]
runs = {(name, s): {task: loss(f"{name}-{s}", task) for task in TASKS} for name in NAMES for s in seeds}
runs |= {("by name", s): {task: loss(f"{task}-{s}", task) for task in TASKS} for s in seeds}
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


def paired(a, b):
    """Difference of the mean of both losses, and its half interval over rows."""
    centre, variance = 0.0, 0.0
    for task in TASKS:
        per_row = [mean([x - y for x, y in pairs]) for pairs in zip(*[list(zip(share(a, s, task), share(b, s, task))) for s in seeds])]
        n, m = len(per_row), mean(per_row)
        centre += sum(per_row) / 2
        variance += n * sum((d - m) ** 2 for d in per_row) / (n - 1) / 4
    return centre, 1.96 * math.sqrt(variance)


print("| | kind | define | mean of both |" + "".join(f" seed {s} |" for s in seeds))
print("|---|---|---|---|" + "---|" * len(seeds))
result = {}
for name, shown in SHOWN.items():
    both = [mean(list(runs[name, s].values())) for s in seeds]
    cells = [mean([runs[name, s][task] for s in seeds]) for task in TASKS] + [mean(both), *both]
    print(f"| {shown} | " + " | ".join(f"{c:.4f}" for c in cells) + " |")
    result[name] = {"mean": mean(both), "seeds": both, **{task: [runs[name, s][task] for s in seeds] for task in TASKS}}
print("\n| difference of the means | over rows | over seeds |\n|---|---|---|")
for a, b in [("layerwise", "kind"), ("layerwise", "define"), ("layerwise", "uniform"), ("layerwise", "bias"), ("layerwise", "by name"), ("bias", "uniform"),
             ("shared", "uniform"), ("shared", "layerwise"), ("depth2", "uniform"), ("depth2", "layerwise")]:
    centre, half = paired(a, b)
    each = [x - y for x, y in zip(result[a]["seeds"], result[b]["seeds"])]
    print(f"| {SHOWN[a]} − {SHOWN[b]} | {centre:+.4f} ± {half:.4f} | {mean(each):+.4f} ± {student(each):.4f} |")
    result.setdefault("differences", {})[f"{a} - {b}"] = {"difference": centre, "half_over_rows": half, "seeds": each, "half_over_seeds": student(each)}
if len(sys.argv) > 2:
    pathlib.Path(sys.argv[2]).write_text(json.dumps(result, indent=1) + "\n")
