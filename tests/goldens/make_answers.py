#!/usr/bin/env python3
"""Makes answers.json beside it: conversations, what transformers 5.23 renders, and where its assistant mask is set.

usage: make_answers.py

The templates have `{% generation %}` tags, by which transformers sets the mask. Without the tags (the test takes them out) the
same ranges must be found. Ranges are in bytes.
"""
import json, pathlib

from transformers.utils.chat_template_utils import _compile_jinja_template, _render_with_assistant_indices

turn = "{{- '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}{{- m.content + '<|im_end|>\\n' }}{% endgeneration %}{% else %}{{- m.content + '<|im_end|>\\n' }}{% endif %}"
ask = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
loop = "{%- for m in messages %}" + turn + "{%- endfor %}" + ask
templates = {
    "plain": loop,
    "looks at the first message": "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{%- endif %}" + loop,
    "refuses an empty conversation": "{%- if not messages %}{{ raise_exception('no messages') }}{%- endif %}" + loop,
    "counts messages": "{{- messages | length ~ ' messages\\n' }}" + loop,
    "looks at the last message": "{{- 'ends with ' + messages[-1].role + '\\n' }}" + loop,
    "looks at later messages": "{%- if messages | selectattr('content', 'in', ['Not quite.']) | list %}{{- 'corrected\\n' }}{%- endif %}" + loop,
    "numbers turns from the end": "{%- for m in messages %}{{- loop.revindex ~ ':' }}" + turn + "{%- endfor %}" + ask,
    "asks for reasoning": "{%- for m in messages %}" + turn + "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}",
    "brackets": "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'assistant' %}{%- generation %}{{- ' ' + m.content | trim + eos_token }}{%- endgeneration %}{%- else %}{{- '[INST] ' + m.content | trim + ' [/INST]' }}{%- endif %}{%- endfor %}",
    "brackets and a count": "{{- bos_token ~ messages | length }}{%- for m in messages %}{%- if m.role == 'assistant' %}{{- ' ' }}{%- generation %}{{- m.content | trim + eos_token }}{%- endgeneration %}{%- else %}{{- '[INST] ' + m.content | trim + ' [/INST]' }}{%- endif %}{%- endfor %}",
}
u, a, s = ((lambda content, role=role: {"role": role, "content": content}) for role in ("user", "assistant", "system"))
conversations = {
    "one": [u("Tallest tree?"), a("Coast redwood.")],
    "with system": [s("Be kind."), u("Häagen-Dazs?"), a("Ja, gerne. \U0001F368"), u("Not quite."), a("Nein.")],
    "assistant first": [a("Welcome to the harbour office."), u("Is berth 4 free?"), a("Yes, until Friday.")],
    "same answers": [u("a"), a("a"), u("a"), a("a"), u("Not quite."), a("a")],
    "two answers on end": [u("q"), a("one"), a("two"), u("Not quite."), a("three")],
    "ends with a question": [u("q"), a("one"), u("Not quite.")],
    "header in a message": [u("Say <|im_start|>assistant\nx"), a("x"), u("Not quite."), a("<|im_start|>assistant\n")],
    "numbers": [u("9157302846915730284"), a("9157302846915730284 9157302846915730285"), u("Not quite."), a("7")],
    "empty answer": [u("q"), a(""), u("Not quite."), a("b")],
}
tokens = {"bos_token": "<s>", "eos_token": "</s>"}
table = []
for kind, tagged in templates.items():
    for name, messages in conversations.items():
        if (kind, name) == ("brackets", "assistant first"):
            continue  # without a generation prompt nothing says whether the blank before a first answer is its own
        text, ranges = _render_with_assistant_indices(_compile_jinja_template(tagged), messages, None, None, False, **tokens)
        to_bytes = lambda n: len(text[:n].encode())
        table.append({"template": kind, "conversation": name, "text": text, "answers": [[to_bytes(x), to_bytes(y)] for x, y in ranges]})
here = pathlib.Path(__file__).parent
rows = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in table)
names = lambda d: json.dumps(d, ensure_ascii=False, indent=1)
(here / "answers.json").write_text(f'{{"templates": {names(templates)},\n"conversations": {json.dumps(conversations, ensure_ascii=False)},\n"table": [\n  {rows}\n]}}\n')
print(len(table), "renderings")
