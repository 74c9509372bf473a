#!/usr/bin/env python3
"""Makes the golden files beside it: what peft 0.21.2, transformers 5.23 and torch 2.15 compute.

usage: make.py [FOLDER_OF_SMOLLM2_GGUF]      (the folder that holds SmolLM2-135M-Instruct.Q4_1.gguf)

Tests read the files; Python is not needed to run them.
"""
import json, pathlib, shutil, sys

import pyarrow.parquet
import torch
import peft
import peft.optimizers
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast,
                          Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

here = pathlib.Path(__file__).parent
torch.manual_seed(0)
CHATML = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
          "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
          "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    t = Tokenizer(models.BPE({s: i for i, s in enumerate(special + alphabet)}, []))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = CHATML
    return fast


tiny = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=259, max_position_embeddings=512, eos_token_id=2, bos_token_id=1)


def spread(model):
    """Weights large enough that attention and norms matter."""
    for name, p in model.named_parameters():
        with torch.no_grad():
            p.normal_(1.0 if "norm" in name else 0.0, 0.15)
    return model.float().eval()


def family(name, model):
    folder = here / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    ids = torch.randint(3, 259, (1, 23))
    with torch.no_grad():
        logits = model(ids).logits[0]
    save_file({"tokens": ids[0].to(torch.float32), "logits": logits.contiguous()}, folder / "golden.safetensors")
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


llama = spread(LlamaForCausalLM(LlamaConfig(**tiny, tie_word_embeddings=True)))
folder = family("tiny-llama", llama)
tokenizer().save_pretrained(folder)
family("tiny-qwen2", spread(Qwen2ForCausalLM(Qwen2Config(**tiny, tie_word_embeddings=False))))
family("tiny-qwen3", spread(Qwen3ForCausalLM(Qwen3Config(**tiny, head_dim=16, tie_word_embeddings=True))))
scaled = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
family("tiny-llama3", spread(LlamaForCausalLM(LlamaConfig(**tiny, tie_word_embeddings=False, rope_parameters=scaled, attention_bias=True, mlp_bias=True))))

ropes = []
for parameters in [dict(rope_type="default", rope_theta=10000.0), dict(rope_type="linear", rope_theta=10000.0, factor=4.0), scaled,
                   dict(rope_type="yarn", rope_theta=1000000.0, factor=4.0, original_max_position_embeddings=128)]:
    config = LlamaConfig(**{**tiny, "hidden_size": 256}, rope_parameters=parameters)
    if parameters["rope_type"] == "default":
        frequencies, factor = config.rope_parameters["rope_theta"] ** (-torch.arange(0, 64, 2).float() / 64), 1.0
    else:
        frequencies, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
    ropes.append({"config": json.loads(config.to_json_string(use_diff=False)), "frequencies": frequencies.tolist(), "factor": factor})
(here / "rope.json").write_text(json.dumps(ropes))

# Adapters: file, logits, gradients, ten steps, merged logits.
# Each file in cases/ is one: the settings of PEFT's configuration, its class as `kind` (LoraConfig), the base as `base` (tiny-llama), and
# how far the weight under an adapter on the head is from the base's (`head_moved_by`).
cases = {path.stem: json.loads(path.read_text()) for path in sorted((here / "cases").glob("*.json"))}
ids = torch.randint(3, 259, (3, 19))


def loss_of(model):
    logits = model(ids).logits[:, :-1].reshape(-1, 259)
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:].reshape(-1))


def fresh(base):
    return LlamaForCausalLM.from_pretrained(here / base, dtype=torch.float32).eval()


for name, settings in cases.items():
    torch.manual_seed(1)
    base, kind = settings.pop("base", "tiny-llama"), settings.pop("kind", "LoraConfig")
    moved = settings.pop("head_moved_by", 0)
    model = get_peft_model(fresh(base), getattr(peft, kind)(task_type="CAUSAL_LM", **settings)).eval()
    head = model.base_model.model.lm_head
    if moved:
        with torch.no_grad():
            head.base_layer.weight.add_(torch.randn_like(head.base_layer.weight) * moved)
    for key, p in model.named_parameters():
        # What starts at zero is moved, and so is a start that is not zero, from which the change is counted.
        if p.requires_grad and not p.any():
            with torch.no_grad():
                p.normal_(0, 0.1)
        elif p.requires_grad and settings.get("init_lora_weights"):
            with torch.no_grad():
                p.add_(torch.randn_like(p) * 0.05)
    out = here / "adapters" / name
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out)
    golden = {"tokens": ids.to(torch.float32), "logits": model(ids).logits.detach().reshape(-1, 259).contiguous()}
    loss_of(model).backward()
    for key, p in model.named_parameters():
        if p.requires_grad:
            short = key.removeprefix("base_model.model.").removesuffix(".default").replace(".default", "").replace(".modules_to_save", "").replace(".base_layer", "")
            golden["grad." + short.removesuffix(".weight")] = p.grad.clone()
            p.grad = None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.01)
    losses = []
    for _ in range(10):
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    golden["losses"] = torch.tensor(losses)
    golden["trained_logits"] = model(ids).logits.detach().reshape(-1, 259).contiguous()
    if hasattr(head, "base_layer"):
        # PEFT would merge into the embedding as well, where the head is tied to it.
        head.base_layer.weight = torch.nn.Parameter(head.base_layer.weight.detach().clone())
    merged = model.merge_and_unload()
    golden["merged_logits"] = merged(ids).logits.detach().reshape(-1, 259).contiguous()
    save_file(golden, out / "golden.safetensors")
    (out / "README.md").unlink(missing_ok=True)
    config = json.loads((out / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")

# LoRA+: ten steps of the groups that PEFT makes, on A, B and biases.
torch.manual_seed(4)
model = get_peft_model(fresh("tiny-llama3"), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", bias="lora_only")).eval()
with torch.no_grad():
    for key, p in model.named_parameters():
        if "lora_B" in key:
            p.normal_(0, 0.1)
out = here / "loraplus"
shutil.rmtree(out, ignore_errors=True)
model.save_pretrained(out)
(out / "README.md").unlink(missing_ok=True)
config = json.loads((out / "adapter_config.json").read_text())
config["base_model_name_or_path"] = "tiny-llama3"
config["target_modules"].sort()
(out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
optimizer = peft.optimizers.create_loraplus_optimizer(model, torch.optim.AdamW, lr=2e-3, loraplus_lr_ratio=8)
losses = []
for _ in range(10):
    loss = loss_of(model)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
save_file({"tokens": ids.to(torch.float32), "losses": torch.tensor(losses), "trained_logits": model(ids).logits.detach().reshape(-1, 259).contiguous()},
          out / "golden.safetensors")

# EVA: what PEFT finds in three batches of rows whose first half is not learnt.
torch.manual_seed(3)
batches = [torch.randint(3, 259, (6, 21)) for _ in range(3)]
labels = [b.clone() for b in batches]
for l in labels:
    l[:, :9] = -100
loader = [dict(input_ids=b, labels=l, attention_mask=torch.ones_like(b)) for b, l in zip(batches, labels)]
config = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules="all-linear", init_lora_weights="eva", eva_config=EvaConfig(rho=2.0, tau=0.9))
model = get_peft_model(fresh("tiny-llama"), config)
initialize_lora_eva_weights(model, loader, show_progress_bar=False)
out = here / "adapters" / "eva"
shutil.rmtree(out, ignore_errors=True)
model.save_pretrained(out)
(out / "README.md").unlink(missing_ok=True)
config = json.loads((out / "adapter_config.json").read_text())
config["base_model_name_or_path"] = "tiny-llama"
(out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
save_file({"tokens": torch.cat(batches).to(torch.float32)}, out / "golden.safetensors")

# The bases of RandLoRA and VeRA at another size than the tiny model's: torch's generator and its rounding.
torch.manual_seed(0)
from peft.tuners.randlora.model import _kaiming_init
bases = {}
for seed in (0, 7, 12345):
    generator = torch.Generator("cpu").manual_seed(seed)
    a = _kaiming_init((6, 1, 77), generator=generator)
    b = torch.cat([_kaiming_init((130, 1, 6), generator=generator) for _ in range(13)], dim=1)
    bases[f"a{seed}"], bases[f"b{seed}"] = a / a.std(), b / b.std()
    generator = torch.Generator("cpu").manual_seed(seed)
    bases[f"rand{seed}"] = torch.rand((5, 31), generator=generator)
save_file(bases, here / "torch_random.safetensors")

# Chat templates.
conversations = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  Häagen-Dazs?\n"}, {"role": "assistant", "content": "Yes."}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "<c> & 'd'"}],
    [{"role": "user", "content": "1\n\n2"}, {"role": "assistant", "content": ""}],
]
templates = {
    "chatml": CHATML,
    "blocks": "{{ bos_token }}{%- set ns = namespace(n=0) -%}\n{%- for m in messages -%}\n  {%- set ns.n = ns.n + 1 -%}\n  {%- if m.role == 'assistant' %}\n"
              "[A{{ ns.n }}] {{ m['content'] | trim }}{{ eos_token }}\n  {%- else %}\n[{{ m.role | upper }}] {{ m.content.strip() }}\n  {%- endif %}\n{%- endfor %}\n"
              "{%- if add_generation_prompt %}\n[A] {% endif %}",
    "json": "{% for m in messages %}\n{{ m | tojson }}\n{% if not loop.last and m.content.startswith('a') %}\n  next: {{ messages[loop.index0 + 1].role.title() }}\n{% endif %}\n"
            "{% endfor %}\n{{ messages | tojson(indent=2) }}\n{{ (messages | selectattr('role', 'equalto', 'user') | list | length) ~ '/' ~ messages|length }}"
            "{% if messages[-1].content.split('\\n')|length > 2 %}{{ messages[-1]['content'].replace('\\n', '|') }}{% endif %}",
}
t = tokenizer()
table = []
for name, template in templates.items():
    t.chat_template = template
    for messages in conversations:
        for prompt in (False, True):
            table.append({"template": template, "messages": messages, "prompt": prompt,
                          "text": t.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)})
(here / "chat.json").write_text(json.dumps({"bos": t.bos_token, "eos": t.eos_token, "table": table}, ensure_ascii=False, indent=1))

# Rows as the Hugging Face hub keeps them.
rows = [json.loads(line) for line in (here / "../../data/sentiment-movies.valid.jsonl").read_text().splitlines()[:20]]
pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), here / "rows.parquet", compression="zstd")

# The real model: tokens of some texts, logits of the base and of an adapter on it.
if len(sys.argv) > 1:
    gguf = dict(gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, **gguf).eval()
    t = AutoTokenizer.from_pretrained(sys.argv[1], **gguf)
    texts = ["The capital of France, in 1789, is", "Naïve café — 東京 🙂\n\n\tx = 3.14;", "<|im_start|>user\nHi there!<|im_end|>\n", "don't  stop   believin'"]
    encoded = [t(text, add_special_tokens=False).input_ids for text in texts]
    ids = torch.tensor([encoded[0] + encoded[3]])
    torch.manual_seed(2)
    with torch.no_grad():
        plain = model(ids).logits[0, -1]
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj"])).eval()
        for key, p in model.named_parameters():
            if "lora_B" in key:
                p.normal_(0, 0.05)
        adapted = model(ids).logits[0, -1]
    out = here / "adapters" / "smollm2"
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    config = json.loads((out / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({"tokens": ids[0].to(torch.float32), "plain": plain, "adapted": adapted}, out / "golden.safetensors")
    (out / "texts.json").write_text(json.dumps([{"text": a, "tokens": b} for a, b in zip(texts, encoded)], ensure_ascii=False))
