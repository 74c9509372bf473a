#!/usr/bin/env python3
"""Answers with draft models against those without: seconds of processor, guesses that stood, and whether the answers are the same. usage: bench/drafts.py LORIMER DRAFT …

Three prompts of 80 tokens each (those of guesses.py), the likeliest tokens and then drawn ones. Nothing is kept from one to the next."""

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

lorimer, drafts = sys.argv[1], sys.argv[2:]
root = Path(__file__).resolve().parents[1]
text = (root / "README.md").read_text()[600:1500]
code = "\n".join((root / "bench/combine_7b.py").read_text().splitlines()[20:60])
PROMPTS = (f"{text}\n\n{text[:300]}", f"{code}\n\n# the same again\n\n{code[:200]}", "Once upon a time")


def processor(process):
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


expected = {}
for draft in (None, *drafts):
    with tempfile.TemporaryDirectory() as empty:
        command = [lorimer, "serve", "--adapters", empty, "--port", "0", "--json", "-q", "--no-prefix-cache"]
        server = subprocess.Popen(command + (["--draft", draft] if draft else []), stdout=subprocess.PIPE, text=True)
        url = json.loads(server.stdout.readline())["url"]
        before = (0, 0)
        for temperature in (0, 0.7):
            begun, answers = processor(server), []
            for prompt in PROMPTS:
                body = {"prompt": prompt, "max_tokens": 80, "temperature": temperature, "seed": 1, "ignore_eos": True}
                request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
                answers.append(json.load(urllib.request.urlopen(request))["choices"][0]["text"])
            seconds = processor(server) - begun
            time.sleep(0.5)
            engine = json.load(urllib.request.urlopen(f"{url}/v1/state"))["figures"]["engine"]
            after = (engine["accepted_tokens"], engine["guessed_tokens"])
            same = "the same" if expected.setdefault(temperature, answers) == answers else "OTHER"
            print(f"{draft or 'no draft'}, temperature {temperature}: {seconds:.1f} s of processor, {after[0] - before[0]} of {after[1] - before[1]} guesses stood, {same} answers")
            before = after
        server.terminate()
        server.wait()
