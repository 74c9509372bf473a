"""What bench/combine.sh measured: losses and accuracies a domain, means over seeds, and differences from the mean of the changes, paired by seed, with
95 % intervals (Student's t over seeds). usage: bench/combine.py FOLDER [results.json to write, or to read where FOLDER is one]"""

import json
import math
import sys
from pathlib import Path

DOMAINS = ["movies", "tweets", "products", "news"]
T = [12.706, 4.303, 3.182, 2.776]
SETS = ["base", "own adapter", "another's adapter", "sum", "mean", "linear", "svd", "magnitude_prune", "ties", "dare_linear", "dare_ties", "magnitude_prune_svd",
        "ties_svd", "dare_linear_svd", "dare_ties_svd", "knots", "lego", "tensors", "other-mean", "other-linear", "other-ties", "other-knots", "other-lego"]
source = Path(sys.argv[1])
if source.is_dir():
    keep = ("loss", "choice_accuracy", "examples")
    runs = {p.stem: {k: v for k, v in json.loads(p.read_text()).items() if k in keep} for p in sorted(source.glob("*-on-*.json"))}
    errors = {p.stem: json.loads(p.read_text()).get("error") for p in source.glob("*.json") if "-on-" not in p.stem}
    errors = {k: v for k, v in sorted(errors.items()) if v is not None}
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(json.dumps({"runs": runs, "errors": errors}, indent=1) + "\n")
else:
    runs, errors = (json.loads(source.read_text())[k] for k in ("runs", "errors"))


def found(name, seed, domain, figure):
    """A figure of a line on a domain; None where it was not measured."""
    if name == "base":
        names = ["base"]
    elif name == "own adapter":
        names = [f"{domain}-{seed}"]
    elif name == "another's adapter":
        names = [f"{d}-{seed}" for d in DOMAINS if d != domain]
    else:
        names = [f"{name}-{seed}"]
    values = [runs.get(f"{n}-on-{domain}", {}).get(figure) for n in names]
    return None if None in values else sum(values) / len(values)


def mean_of(name, seed, figure):
    values = [found(name, seed, d, figure) for d in DOMAINS]
    return None if None in values else sum(values) / len(values)


def interval(values, digits=3):
    if not values:
        return "-"
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return f"{mean:+.{digits}f}"
    half = T[n - 2] * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return f"{mean:+.{digits}f} [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]"


seeds = sorted({int(k.split("-on-")[0].rsplit("-", 1)[1]) for k in runs if k.startswith("mean-")})
print(f"seeds {seeds}; mean loss a supervised token on each domain, mean accuracy, and both less those of `mean`, paired by seed; error: distance to the weighted sum\n")
print(f"| line | {' | '.join(DOMAINS)} | loss | accuracy, % | loss less mean's | accuracy less mean's, points | error, % | seeds |\n|{'---|' * (len(DOMAINS) + 7)}")
for name in SETS:
    own = [s for s in seeds if mean_of(name, s, "loss") is not None]
    if not own:
        continue
    average = lambda values: sum(values) / len(values)
    columns = [f"{average([found(name, s, d, 'loss') for s in own]):.3f}" for d in DOMAINS]
    loss = average([mean_of(name, s, "loss") for s in own])
    accuracy = 100 * average([mean_of(name, s, "choice_accuracy") for s in own])
    both = [s for s in own if mean_of("mean", s, "loss") is not None]
    less = lambda figure, factor: [factor * (mean_of(name, s, figure) - mean_of("mean", s, figure)) for s in both]
    away = [errors[f"{name}-{s}"] for s in own if f"{name}-{s}" in errors]
    away = f"{100 * average(away):.1f}" if away else "-"
    print(f"| {name} | {' | '.join(columns)} | {loss:.3f} | {accuracy:.1f} | {interval(less('loss', 1))} | {interval(less('choice_accuracy', 100), 1)} | {away} | {len(own)} |")
pairs = [(mean_of("lego", s, "loss"), mean_of("linear", s, "loss")) for s in seeds]
pairs = [a - b for a, b in pairs if a is not None and b is not None]
print("\nLoRA-LEGO's loss less that of `linear` with weights of 1/4 (the average of the factors):", interval(pairs))
