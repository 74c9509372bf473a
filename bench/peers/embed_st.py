#!/usr/bin/env python3
"""Sentence embeddings by sentence-transformers 6.2 (torch 2.15, transformers 5.23), f32, two threads.

usage: embed_st.py MODEL_FOLDER FILE [BATCH [sorted|unsorted]]

FILE is JSON, a list of texts or an object with such a list as `sentences`, or has one text a line. `sorted` is what sentence-transformers does:
the longest texts first, batches of like lengths; `unsorted` batches the texts in the file's order. Without BATCH, batches of 1, 8 and 32 are
timed in both orders, one after the other, and the figures above them are those of the default, 32 sorted. The model is loaded and has embedded
every text once before a clock starts. Prints one JSON object.
"""
import json, os, resource, sys, time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")
import sentence_transformers
import torch

torch.set_num_threads(2)
folder, path, *rest = sys.argv[1:]
text = open(path, encoding="utf-8").read()
try:
    texts = json.loads(text)
    texts = texts["sentences"] if isinstance(texts, dict) else texts
except json.JSONDecodeError:
    texts = text.splitlines()
model = sentence_transformers.SentenceTransformer(folder, device="cpu")


def embed(batch, order):
    if order == "sorted":
        return model.encode(texts, batch_size=batch, show_progress_bar=False)
    return [model.encode(texts[i:i + batch], batch_size=batch, show_progress_bar=False) for i in range(0, len(texts), batch)]


embed(32, "sorted")
wanted = [(int(rest[0]), rest[1] if len(rest) > 1 else "sorted")] if rest else [(b, o) for b in (1, 8, 32) for o in ("unsorted", "sorted")]
runs = []
for batch, order in wanted:
    start = time.perf_counter()
    embed(batch, order)
    seconds = time.perf_counter() - start
    runs.append({"batch": batch, "order": order, "seconds": seconds, "sentences_per_second": len(texts) / seconds})
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"name": f"sentence-transformers {sentence_transformers.__version__}", "sentences": len(texts), "seconds": runs[-1]["seconds"],
                  "sentences_per_second": runs[-1]["sentences_per_second"], "peak_bytes": peak, "runs": runs}))
