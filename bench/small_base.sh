#!/bin/sh
# A byte-level Llama of 1.2 million parameters, trained from scratch on the texts of data/: a base for experiments that should take minutes.
# usage: bench/small_base.sh LORIMER FOLDER [STEPS]    (the model is then FOLDER/base)
set -e
lorimer=$1 folder=$2 steps=${3:-400}
mkdir -p "$folder/start"
cp tests/goldens/tiny-llama/tokenizer.json tests/goldens/tiny-llama/tokenizer_config.json tests/goldens/tiny-llama/chat_template.jinja "$folder/start"
python3 - "$folder/start" <<'PY'
import array, json, random, struct, sys
random.seed(0)
hidden, inner, layers, heads, kv, d = 128, 384, 6, 8, 4, 16
config = json.load(open("tests/goldens/tiny-llama/config.json")) | {
    "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": d}
json.dump(config, open(f"{sys.argv[1]}/config.json", "w"), indent=1)
shapes = {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden]}
for i in range(layers):
    for name, shape in {"self_attn.q_proj": [heads * d, hidden], "self_attn.k_proj": [kv * d, hidden], "self_attn.v_proj": [kv * d, hidden],
                        "self_attn.o_proj": [hidden, heads * d], "mlp.gate_proj": [inner, hidden], "mlp.up_proj": [inner, hidden],
                        "mlp.down_proj": [hidden, inner], "input_layernorm": [hidden], "post_attention_layernorm": [hidden]}.items():
        shapes[f"model.layers.{i}.{name}.weight"] = shape
header, data = {}, array.array("f")
for name, shape in shapes.items():
    begin, count = 4 * len(data), shape[0] * (shape[1] if len(shape) == 2 else 1)
    data.extend([1.0] * count if len(shape) == 1 else [random.gauss(0, 0.05) for _ in range(count)])
    header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, 4 * len(data)]}
text = json.dumps(header).encode()
text += b" " * (-len(text) % 8)
open(f"{sys.argv[1]}/model.safetensors", "wb").write(struct.pack("<Q", len(text)) + text + data.tobytes())
PY
cat data/wordnet-define.train.jsonl data/sentiment-movies.train.jsonl data/sentiment-products.train.jsonl > "$folder/texts.jsonl"
"$lorimer" train --model "$folder/start" --data "$folder/texts.jsonl" --train-on-prompt --method full --modules-to-save embed_tokens,norm,input_layernorm,post_attention_layernorm \
  --lr 3e-3 --schedule cosine --warmup-steps 20 --batch-size 16 --max-length 256 --max-steps "$steps" --overwrite -q --output "$folder/full"
rm -rf "$folder/base"
"$lorimer" merge --model "$folder/start" --adapter "$folder/full" --output "$folder/base" -q
