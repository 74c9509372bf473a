#!/usr/bin/env python3
"""Writes python_re.json: which module paths Python's `re` matches as PEFT asks it, for patterns of the kind that people write.

usage: make_python_re.py
"""
import json, pathlib, re

PATHS = [
    "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.12.self_attn.k_proj", "model.layers.12.mlp.up_proj",
    "model.layers.23.mlp.down_proj", "lm_head", "model.embed_tokens", "model.layers.3.mlp.experts.7.up_proj", "a&b~c[d]-e", "model.layers.1.Q_PROJ",
]
PATTERNS = [
    r".*q_proj", r"q_proj", r".*\.(q|k)_proj", r".*layers\.(1[0-9]|2[0-3])\..*proj", r"^model\.layers\.\d+\.self_attn\..+$",
    r"^(?!.*layers\.(?:0|1)\.).*\.(?:q_proj|up_proj)$", r"(?=.*layers\.1\d\.).*q_proj|.*up_proj", r".*(?<!q)_proj", r".*(?<=self_attn\.)q_proj",
    r"(?P<a>model|lm)(?:_|\.).*", r"(?:.*\.)?(?P<x>\d)(?P=x)?\..*", r".*\.(\d)\1.*|lm_head", r"(?i).*q_proj", r".*\.layers\.(?:0|1)\.(?>self_attn)\.q_proj",
    r".*[^_]proj|.*[\w.]+_proj", r"[a-z&&b]+.*", r"[]a]&.*", r"a&b~c[[]d[\]]-e", r"[^[]*", r".*[&~]+.*", r".*\Z", r"\Amodel\.embed_tokens\Z",
    r".*_proj{1}", r".*_pro{0,2}j", r".*?(q|k)_proj++", r"(lm_)?(?(1)head|model\..*)", r"model.embed.tokens", r".*\bq_proj\b", r"lm_head|q", r"",
]
BEHIND = [r"q_proj", r"layers\.1\..*", r"layers.1", r"mlp", r"(q|k)_proj", r"up_proj|head", r"(?=.*2).*k_proj", r"self_attn\.q_proj", r"e", r"tokens|.*q_proj"]

whole = [{"pattern": p, "matches": [x for x in PATHS if re.fullmatch(p, x)]} for p in PATTERNS]
behind = [{"pattern": p, "matches": [x for x in PATHS if re.match(rf"(.*\.)?({p})$", x)]} for p in BEHIND]
out = pathlib.Path(__file__).parent / "python_re.json"
out.write_text(json.dumps({"paths": PATHS, "fullmatch": whole, "pattern_key": behind}, indent=1) + "\n")
