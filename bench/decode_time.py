#!/usr/bin/env python3
"""Processor time of one decoded token, of models in turns: (time of 100 tokens − time of 4) / 96, so that loading and the prompt drop out.

usage: decode_time.py LORIMER [--turns N] MODEL...    (medians; processor time, so that other work on the machine counts less than by the clock)
"""
import json, os, statistics, subprocess, sys

arguments = sys.argv[1:]
lorimer, turns = arguments.pop(0), 5
if arguments[0] == "--turns":
    turns = int(arguments[1])
    arguments = arguments[2:]


def run(model, tokens):
    command = [lorimer, "generate", "--model", model, "--raw", "--prompt", "1, 2, 3, 4, 5, 6, 7, 8,", "--max-tokens", str(tokens), "--json", "-q"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    answer = json.loads(process.stdout.read())
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"{model}: generate failed")
    return usage.ru_utime + usage.ru_stime, answer["tokens"]


found = {model: [] for model in arguments}
for _ in range(turns):
    for model in arguments:
        (few, first), (many, last) = run(model, 4), run(model, 100)
        if last < 50:
            sys.exit(f"{model} ended its answer after {last} tokens; take another model or prompt")
        found[model].append(1000 * (many - few) / (last - first))
whole = statistics.median(found[arguments[0]])
for model, times in found.items():
    middle = statistics.median(times)
    shown = ", ".join(f"{t:.1f}" for t in sorted(times))
    print(f"{os.path.basename(model.rstrip('/')):<16}{middle:>8.1f} ms of processor time a token ({shown}), {whole / middle:.2f} times the first one's speed")
