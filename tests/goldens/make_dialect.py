#!/usr/bin/env python3
"""Makes dialect.json beside it: what chat templates' expressions give in transformers 5.23 (jinja2 3.1).

usage: make_dialect.py

Each case is a template and the text that transformers' own compiled template gives for one fixed context, or null where it
refuses; `tests/goldens.rs` renders the same with `ChatTemplate`.
"""
import json, pathlib

from transformers.utils.chat_template_utils import _compile_jinja_template

context = {
    "messages": [
        {"role": "system", "content": "Be brief.\nBe kind."},
        {"role": "user", "content": "Is it low tide, L'été?", "name": "Ada Lovelace", "ok": True, "n": 3, "x": 1.5, "list": [3, 1, 2], "extra": {"b": [1, {"c": None}], "a": "é\"<&>'\n"}},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "tide", "arguments": {"port": "Brest", "hours": 3, "deep": {"z": 1.0, "a": None}}}}]},
        {"role": "tool", "content": "4.1 m", "tool_call_id": "c1"},
        {"role": "assistant", "content": "<think>\nlow\n</think>\n\nYes, until noon."},
    ],
    "tools": [
        {"type": "function", "function": {"name": "tide", "description": "L'été <b>&</b> \U0001F30A", "parameters": {"type": "object", "zeta": 1, "alpha": {"b": True, "a": None, "x": 1.5, "big": 123456789012}, "empty": {}, "none": []}}},
        {"type": "function", "function": {"name": "moon", "parameters": {"properties": {"day": {"type": "string", "enum": ["a", "b"]}}}}},
    ],
    "add_generation_prompt": True,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "enable_thinking": False,
    "documents": None,
}

P = "tools[0].function.parameters"
E = "messages[1].extra"
M = "messages[1]"
expressions = f"""
none
true
false
True
None
missing
{M}.ok
not {M}.ok
{P}
{E}
{M}.list
[1, 'a', none, true, 1.0, "it's"]
(1, 'a')
(1,)
()
[]
{{}}
{{'a': 1, 2: 'b'}}
{{'a': (1, 2)}}
'a' ~ none ~ true ~ 1.0 ~ [1]
tools | string
{E} | string
1.0
0.1 + 0.2
1e20
1e16
1e15
123456789.0
1.5e-7
0.0001
0.00001
10 ** 20
2 ** 10
2 ** -1
7 / 2
4 / 2
7 // 2
-7 // 2
7 % 3
-7 % 3
7.5 % 2
7 // 2.0
-5 | abs
1 + 2 * 3
(1 + 2) * 3
'a' * 3
[1] * 2
[1] + [2]
(1,) + (2,)
true + 1
1 == 1.0
1 == true
'1' == 1
1 < 2 < 3
1 < 2 > 1
'a' < 'b'
[1, 2] < [1, 3]
1 in [1, 2]
'a' in 'cat'
'a' not in 'cat'
'role' in {M}
'nope' in {M}
'a' if true
'a' if false
'a' if false else 'b'
'' or 'x'
'a' and 'b'
0 and 'b'
none or 0 or []
not []
-3
+3
{M}['content']
{M}['nope']
{M}.nope
{M}.nope.deep
{M}[0]
messages[-1].role
messages[9]
messages[0]['content'][0]
messages[0].content[-1]
messages[0].content[0:2]
messages[0].content[:-1]
messages[0].content[::-1]
messages[0].content[::2]
messages[0].content[5:1:-1]
messages[0].content[-3:]
messages[0].content[100:]
'été'[1:]
'été'[::-1]
messages[::-1] | map(attribute='role') | list
messages[1:] | length
messages[:2] | map(attribute='role') | join(',')
messages[::2] | map(attribute='role') | join(',')
messages[-2:] | map(attribute='role') | join(',')
messages[1:][::-1] | map(attribute='role') | join(',')
(messages | list)[1:3] | length
[1, 2, 3, 4][1:-1]
[1, 2, 3, 4][::-2]
(1, 2, 3)[1:]
tools | tojson
tools | tojson(indent=2)
tools | tojson(indent=4)
tools | tojson(2)
tools | tojson(false, 2)
tools | tojson(indent=0)
tools | tojson(indent='\\t')
tools | tojson(sort_keys=true)
tools | tojson(indent=2, sort_keys=true)
tools | tojson(separators=(',', ':'))
tools | tojson(separators=[',', ':'])
tools | tojson(indent=1, separators=(',', ': '))
tools | tojson(separators=none)
tools | tojson(ensure_ascii=true)
tools | tojson(ensure_ascii=false)
tools | tojson(ensure_ascii=True, indent=2)
{E} | tojson
{E} | tojson(ensure_ascii=true)
'\\u0001\\x7f\\u2028/\\\\' | tojson
'\\u0001\\u2028é' | tojson(ensure_ascii=true)
none | tojson
true | tojson
1.0 | tojson
1e20 | tojson
1e16 | tojson
1e-7 | tojson
(1, 2) | tojson
[] | tojson(indent=2)
{{}} | tojson(indent=2)
[[], {{}}] | tojson(indent=2)
missing | tojson
{{'b': 1, 'a': 2}} | tojson
{{'b': 1, 'a': 2}} | tojson(sort_keys=True)
{{1: 2}} | tojson
'a' | tojson | length
'"' | tojson | replace('"', '')
{E}.items() | list
{E}.keys() | list
{E}.values() | list
{E} | items | list
{E} | dictsort
{{'b': 1, 'A': 2}} | dictsort
{{'b': 1, 'A': 2}} | dictsort(true)
{{'b': 1, 'A': 2}} | dictsort(by='value')
{{'b': 1, 'A': 2}} | dictsort(reverse=true)
{M}.get('content')
{M}.get('nope')
{M}.get('nope', 'd')
{M}.get('nope', default='d')
{M} | length
{M}.keys() | join(',')
{E}.items() | map('first') | join
dict(a=1, b='x')
dict(a=1).a
dict([('a', 1)])
dict({{'a': 1}}, b=2)
namespace(a=1).a
range(3) | list
range(1, 7, 2) | list
range(5, 0, -2) | list
range(3)
'abc'.upper()
'ABC'.lower()
'abc def'.title()
"they're bill's".title()
'aBC'.capitalize()
'aBc'.swapcase()
'ß'.casefold()
' a '.strip()
'xxaxx'.strip('x')
'..a..'.lstrip('.')
'..a..'.rstrip('.')
'abcba'.strip('ab')
' \\n\\ta\\x0b '.strip()
'a,b,,c'.split(',')
'a b  c'.split()
' a b '.split()
'a,b,c'.split(',', 1)
'a,b,c'.split(',', maxsplit=1)
'a,b,c'.split(sep=',')
'a b c'.split(none, 1)
'a b c d'.split(maxsplit=2)
'a/b/c'.rsplit('/', 1)
'a/b/c'.rsplit('/')
'a b c'.rsplit(none, 1)
' a b '.rsplit()
'a=b=c'.partition('=')
'a=b=c'.rpartition('=')
'abc'.partition('=')
'abc'.rpartition('=')
'a\\nb\\r\\nc\\n'.splitlines()
'a\\nb\\n'.splitlines(true)
'a\\n\\nb'.splitlines()
'a\\x0cb\\u2028c\\rd'.splitlines()
''.splitlines()
''.split()
''.split(',')
'aXbX'.replace('X', '-')
'aXbX'.replace('X', '-', 1)
'ab'.replace('', '-')
'abc'.startswith('ab')
'abc'.startswith(('x', 'a'))
'abc'.startswith('b', 1)
'abc'.endswith('bc')
'abc'.endswith(('x', 'c'))
'abc'.endswith('b', 0, 2)
'banana'.count('an')
'banana'.count('')
'banana'.count('a', 2)
'banana'.find('n')
'banana'.find('x')
'banana'.find('n', 3)
'banana'.rfind('n')
'banana'.index('n')
'banana'.index('x')
'banana'.rindex('n')
'abc'.removeprefix('a')
'abc'.removesuffix('c')
'abc'.removeprefix('x')
'a'.ljust(3) ~ '|'
'a'.rjust(3)
'a'.rjust(3, '*')
'a'.center(4, '*')
'ab'.center(5, '*')
'ab'.center(4)
'7'.zfill(3)
'-7'.zfill(4)
'a\\tb'.expandtabs(4)
'abc'.isalpha()
'ab1'.isalnum()
'12'.isdigit()
'²'.isdigit()
'½'.isnumeric()
'½'.isdigit()
'12'.isdecimal()
'²'.isdecimal()
'abc'.islower()
'ABC'.isupper()
' '.isspace()
'Abc Def'.istitle()
'abc'.isidentifier()
'abc'.isascii()
'é'.isascii()
'a\\n'.isprintable()
', '.join(['a', 'b'])
', '.join(('a', 'b'))
','.join('abc')
','.join([1])
'{{}}+{{}}'.format(1, 'b')
'{{0}} {{1}} {{0}}'.format('a', 'b')
'{{a}} {{b!r}}'.format(a=1, b='x')
'{{:>5}}|{{:<4}}|{{:^5}}|{{:05.2f}}'.format('a', 'b', 'c', 2.5)
'{{:,}} {{:x}} {{:08b}} {{:.1%}} {{:e}}'.format(1234567, 255, 5, 0.256, 12345.678)
'{{{{}}}}'.format()
'{{m[role]}}'.format(m=messages[0])
'%s-%02d' % ('a', 7)
'%s' % 'a'
'%s' % 7
'%s' % [1, 2]
'%d' % 3.7
'%5s|%-5s|' % ('a', 'b')
'%.2f %5.1f %e %g' % (2.567, 2.567, 12345.678, 0.0001)
'%x %X %o %c' % (255, 255, 8, 'z')
'%r %s' % ('a', none)
'%%' % ()
'100%% %s' % 'a'
'%(a)s %(b)03d' % {{'a': 'x', 'b': 7}}
'%s' % {M}.name
'%s and %s' % ({M}.role, messages[0].role)
'%s' % 'a' ~ 'b'
'a' ~ '%s' % 'b'
'%s' % ('a' | upper)
'%s' % 'a' | upper
'%s%%' % 5
'%+d % d' % (5, 5)
'%s %s' % (1,)
'%s' % (1, 2)
'%5.3s|' % 'abcdef'
'%*d' % (5, 3)
7 % 3 ~ '%'
7 % 3 == 1
(messages | length) % 2
messages | length % 2
10 - 7 % 4
2 * 7 % 4
7 % 4 * 2
7 % 4 % 2
-7 % 4
7 % -4
[7 % 4, '%s' % 1]
{{'a': 7 % 4}}
messages[7 % 4].role
'%s|%s' | format('a', 1)
'%(a)s' | format(a=1)
'abc' | upper
'aBC' | capitalize
'abc def-ghi' | title
' a ' | trim
'xax' | trim('x')
'abc' | length
'abc' | list
'abc' | first
'abc' | last
'abc' | reverse
[1, 2] | reverse | list
'a b c' | replace('b', 'x')
'aaa' | replace('a', 'b', 2)
missing | default('d')
'' | default('d')
'' | default('d', true)
none | default('d')
missing | d('e')
false | default('d', boolean=true)
[3, 1, 2] | sort
[3, 1, 2] | sort(reverse=true)
['b', 'A', 'c'] | sort
['b', 'A', 'c'] | sort(case_sensitive=true)
messages | sort(attribute='role') | map(attribute='role') | join(',')
['a', 'b', 'A'] | unique | list
[1, 2, 1] | unique | list
[1, 2, 3] | sum
messages[1:2] | sum(attribute='n')
[1, 2] | join('-')
['a', none, 1.0] | join(',')
messages | join(',', attribute='role')
messages | map(attribute='role') | list
messages | map(attribute='name', default='?') | list
messages | map(attribute='extra.a') | list | length
['a', 'b'] | map('upper') | list
['a-b', 'c'] | map('replace', '-', '+') | join
messages | selectattr('role', 'equalto', 'user') | list | length
messages | selectattr('role', '==', 'user') | list | length
messages | selectattr('role', 'eq', 'user') | map(attribute='role') | first
messages | selectattr('role', 'in', ['user', 'tool']) | list | length
messages | selectattr('name') | list | length
messages | selectattr('name', 'defined') | list | length
messages | selectattr('tool_calls', 'defined') | list | length
messages | selectattr('nope.deep') | list | length
messages | rejectattr('role', 'equalto', 'system') | list | length
messages | rejectattr('role', 'ne', 'system') | list | length
[1, 2, 3] | select('odd') | list
[1, 2, 3] | reject('odd') | list
[0, 1, ''] | select | list
[1, 2, 3] | select('greaterthan', 1) | list
[1, 2, 3] | select('>', 1) | list
messages | groupby('role') | map('first') | join(',')
messages | groupby('role') | map(attribute='grouper') | join(',')
[1, 2, 3, 4, 5] | batch(2) | list
[1, 2, 3] | batch(2, 'x') | list
[1, 2, 3, 4, 5] | slice(2) | list
[1, 2, 3] | first
[] | first
[] | last
[3, 1] | min
[3, 1] | max
['b', 'A'] | min
messages | max(attribute='role') | length
'12' | int
'x' | int
'x' | int(7)
'0x1f' | int(0, 16)
2.9 | int
'2.9' | int
'2.5' | float
'x' | float
2.567 | round
2.567 | round(1)
2.567 | round(1, 'floor')
2.1 | round(0, 'ceil')
2.5 | round
3.5 | round | int
5 | string
'a\\nb' | indent
'a\\nb' | indent(2)
'a\\nb' | indent(2, true)
'a\\n\\nb' | indent(2)
'a\\n\\nb' | indent(2, blank=true)
'a\\nb' | indent(width=2, first=true)
'a\\nb' | indent('> ')
'<b>' | e
'<b>' | escape
'<b>' | safe
('<b>' | safe) ~ '<i>'
'a b c d' | wordcount
'a b c d e f' | truncate(5)
'foo bar baz qux' | truncate(9)
'foo bar baz qux' | truncate(9, true)
'foo bar baz qux' | truncate(9, true, '')
'foo bar baz qux' | wordwrap(7)
'<p>a</p>' | striptags
'a' | center(5)
'a b&c' | urlencode
1000 | filesizeformat
[1, 2] | pprint
messages[0] | attr('role')
{E} | attr('a')
messages | random | length > 0
{{'a': 1}} | xmlattr
'abc' | count
'a' | forceescape
[[1, 2], [3]] | sum(start=[])
messages is defined
missing is defined
missing is undefined
messages is iterable
'a' is iterable
{E} is iterable
1 is iterable
none is iterable
missing is iterable
messages is sequence
'a' is sequence
{E} is sequence
1 is sequence
none is sequence
(1, 2) is sequence
range(3) is sequence
messages[:1] is sequence
messages[::-1] is sequence
(1, 2)[:1] is sequence
(messages | list) is sequence
(messages | map(attribute='role')) is sequence
messages[1:] is iterable
{E}.items() is sequence
{E} is mapping
messages is mapping
'a' is mapping
'a' is string
1 is string
1 is number
1.0 is number
true is number
1 is integer
true is integer
1.0 is float
1 is float
true is boolean
1 is boolean
none is none
missing is none
0 is none
true is true
1 is true
false is false
0 is false
3 is odd
4 is even
6 is divisibleby 3
6 is divisibleby(4)
'a' is in 'abc'
1 is in [1, 2]
1 is eq 1
1 is ne 2
1 is equalto 1
1 is sameas 1
none is sameas none
true is sameas true
2 is gt 1
2 is ge 2
1 is lt 2
1 is le 0
2 is greaterthan 1
1 is lessthan 2
'abc' is lower
'ABC' is upper
'upper' is filter
'nope' is filter
'odd' is test
dict is callable
raise_exception is callable
'a' is callable
'a' is escaped
missing is not defined
1 is not none
not 1 is none
1 is defined and 2 is defined
strftime_now is defined
raise_exception is defined
loop is defined
self is defined
missing ~ 'a'
missing + 'a'
'a' + missing
missing == ''
missing | length
missing | list
missing | upper
missing | join
missing == none
'a' + 1
1 + 'a'
'a' + none
none + 1
{{}}.nope
'abc'.nope
'a' 'b'
'a"b'
"a'b"
'a\\'b'
'a\\\\n'
'a\\x41\\u00e9\\t'
'a\\/b'
1_000
0x10
0b11
0o17
1.5e3
['a', 'b',]
{{'a': 1,}}
[1, [2, [3]]] | string
{{'a': {{'b': 'c'}}}} | string
[1.0, 2.5] | string
['é', 'a"b', "a'b", 'a\\nb', '\\\\'] | string
['\\u2028', '\\x7f', '\\xa0', '\\U0001F30A'] | string
lipsum is defined
cycler is defined
joiner is defined
[1,2].append
[1, 2].index(2)
[1, 2, 2].count(2)
[1, 2].copy()
{E}.copy() | length
(1, 2).count(1)
(1, 2).index(2)
1.5.is_integer()
(3).bit_length()
messages[1].list | map('string') | join
messages | map('length') | list
messages[1].list | sort | first
(messages | first).role
messages[0].items() | first
messages | first | attr('role')
messages | tojson | length
messages[4].content.split('</think>')[-1].lstrip('\\n')
messages[4].content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n')
'</think>' in messages[4].content
messages[2].tool_calls[0].function.arguments | tojson
messages[2].tool_calls[0].function.arguments.items() | list
messages[2].tool_calls[0]['function']['arguments']['deep']
(messages | selectattr('role', 'equalto', 'user') | list)[-1].content
messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join('\\n')
loop.index
cycler('a', 'b').next()
enable_thinking is defined and enable_thinking is false
enable_thinking is defined and not enable_thinking
documents is defined
documents
messages.0.role
messages.-1
{M}.list.0
{M}.name.split(' ')[0]
{M}.name.split(' ') | last
1 if {M}.n > 2 else 0
{M}.n * 2
{M}.n ~ '/' ~ {M}.x
({M}.n | string) + 'a'
{M}.n | string | length
{M}.list | string
""".strip("\n").split("\n")

templates = [
    "a\n", "a\n\n", "\na", "a{# c #}b", "a {#- c -#} b", "a\n{# c #}\nb", "{#\n c\n#}\nb",
    "{% raw %}{{ x }}{% endraw %}", "{%- raw -%} {{ x }} {%- endraw -%} b", "{% raw %}\n{% if %}\n{% endraw %}\nb",
    "  {% if true %}\n  a\n  {% endif %}\n  b\n", "x \n {%- if true -%} \n y \n {%- endif %} z", "x\n  {%+ if true %}\n y{% endif +%}\n z",
    "{{ 'a' }}\n{{ 'b' -}}\n c", "{{- 'a' }}", " {{- 'a' -}} ", "a\r\n{% if true %}\r\nb\r\n{% endif %}\r\nc",
    "{% for m in messages %}{{ loop.index0 }}{{ loop.index }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }} {% endfor %}",
    "{% for m in messages %}{{ loop.previtem.role if loop.previtem is defined else '-' }}>{{ loop.nextitem.role if loop.nextitem is defined else '-' }} {% endfor %}",
    "{% for m in messages %}{% if loop.changed(m.role) %}{{ m.role }}{% endif %}{{ loop.cycle('a', 'b') }}{% endfor %}",
    "{% for m in messages if m.role == 'assistant' %}{{ loop.index }}/{{ loop.length }}{% else %}none{% endfor %}",
    "{% for m in [] %}a{% else %}b{% endfor %}", "{% for m in missing %}a{% else %}b{% endfor %}", "{% for m in none %}a{% endfor %}",
    "{% for k, v in " + P + ".items() %}{{ k }}={{ v }};{% endfor %}", "{% for k, v in " + P + " | items %}{{ k }};{% endfor %}",
    "{% for k in " + P + " %}{{ k }};{% endfor %}", "{% for k, v in " + P + " | dictsort %}{{ k }};{% endfor %}",
    "{% for a, b in [(1, 2), (3, 4)] %}{{ a }}{{ b }}{% endfor %}", "{% for a, (b, c) in [(1, (2, 3))] %}{{ a }}{{ b }}{{ c }}{% endfor %}",
    "{% for c in 'abc' %}{{ c }}-{% endfor %}", "{% for i in range(3) %}{{ i }}{% endfor %}",
    "{% for m in messages[::-1] %}{% if m.role == 'user' %}{{ loop.index0 }}{% break %}{% endif %}{% endfor %}",
    "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "{% for m in messages recursive %}{{ m.role }}{% endfor %}", "{% for x in [[1, [2]], [3]] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}@{{ loop.depth }}{% endif %}{% endfor %}",
    "{% set a = 1 %}{% for i in [1, 2] %}{% set a = a + i %}{{ a }}{% endfor %}{{ a }}", "{% set ns = namespace(a=1) %}{% for i in [1, 2] %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}",
    "{% set ns = namespace() %}{% set ns.x = [] %}{% for i in [1, 2] %}{% set ns.x = ns.x + [i] %}{% endfor %}{{ ns.x }}{{ ns.nope is defined }}",
    "{% set ns = namespace({'a': 1}, b=2) %}{{ ns.a }}{{ ns['b'] }}", "{% set ns = namespace(a=1) %}{{ ns }}", "{% set a, b = 1, 2 %}{{ a }}{{ b }}", "{% set a, b = (1, 2) %}{{ a }}{{ b }}",
    "{% set t %}in {{ 1 + 1 }}{% endset %}[{{ t | trim }}]", "{% set t | upper %}in{% endset %}{{ t }}", "{% set a = 'x' if false %}[{{ a }}]{{ a is defined }}",
    "{% if true %}{% set a = 1 %}{% endif %}{{ a }}", "{% if false %}{% set a = 1 %}{% endif %}{{ a is defined }}",
    "{% if messages[0].role == 'system' %}a{% elif messages %}b{% else %}c{% endif %}", "{% if missing %}a{% elif not missing %}b{% endif %}",
    "{% macro f(x, y='z') %}<{{ x }}{{ y }}>{% endmacro %}{{ f('a') }}{{ f('b', y='c') }}{{ f(x='d') }}{{ f() }}",
    "{% macro f(x) %}{{ x }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1, 2, a=3) }}", "{% macro f() %}{{ caller() }}!{% endmacro %}{% call f() %}in{% endcall %}",
    "{% macro f() %}{{ caller('a') }}!{% endmacro %}{% call(x) f() %}in {{ x }}{% endcall %}", "{% macro f(n) %}{{ n }}{% if n > 0 %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(3) }}",
    "{% macro f() %}  a  {% endmacro %}[{{ f() | trim }}]", "{% macro f(m) %}{{- m.role }}:{{ eos_token }}{% endmacro %}{% for m in messages %}{{ f(m) }}{% endfor %}",
    "{% macro f() %}{{ a }}{% endmacro %}{% set a = 1 %}{{ f() }}", "{% macro f(a, b=a) %}{{ b }}{% endmacro %}{{ f(1) }}", "{% macro f(m) %}{% for x in m %}{{ x }}{% endfor %}{% endmacro %}{{ f([1, 2]) ~ 'x' }}{{ f.name }}{{ f.arguments }}",
    "{% filter upper %}ab{{ 'c' }}{% endfilter %}", "{% filter replace('a', 'b') | upper %}aa{% endfilter %}", "{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}{{ a is defined }}", "{% with %}{% set a = 1 %}{% endwith %}{{ a is defined }}",
    "{% autoescape true %}{{ '<b>' }}{% endautoescape %}", "{% block a %}x{{ messages | length }}{% endblock %}", "{% do messages %}x",
    "{% set x = {'a': 1} %}{% set _ = x.update({'b': 2}) %}{{ x }}", "{% set x = [] %}{% set _ = x.append(1) %}{{ x }}", "{{ messages.append(1) }}", "{{ messages[0].pop('role') }}",
    "{{ raise_exception('no') }}", "{% if false %}{{ raise_exception('no') }}{% endif %}x", "{{ messages[0].__class__ }}", "{{ ''.__class__ }}",
    "{{ '%Y' | string }}", "{{ strftime_now('%Y') | length }}", "{{ strftime_now('%d %B %Y') | length > 9 }}", "{{ strftime_now('%%') }}", "{{ strftime_now('%Y-%m-%d').split('-') | length }}",
    "{% generation %}a{% endgeneration %}", "a\n{% generation %}\nb\n{% endgeneration %}\nc", "a {%- generation -%} b {%- endgeneration -%} c", "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ loop.index }}{% endgeneration %}{% endif %}{% endfor %}",
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "{# {% generation %} #}a", "{% raw %}{% generation %}{% endraw %}", "{{ '{% generation %}' }}", "{%generation%}a{%endgeneration%}", "{%+ generation %}a{% endgeneration +%}\nb",
    "{{ '}}' }}", "{{ '%}' }}{% if '%}' == '%}' %}a{% endif %}", "{{ \"{{ a }}\" }}", "{{ {'a': {'b': 1}} }}", "{{{'a': 1}}}", "{{ {'a': {'b': 1}}['a']['b'] }}",
    "{% set fmt = '%s=%s' %}{{ fmt % ('a', 1) }}{% for m in messages %}{{ '%d' % loop.index }}{{ loop.index % 2 }}{% if loop.index0 % 2 == 0 %}e{% endif %}{% endfor %}",
    "{% if (messages[0].role == 'user') != (1 % 2 == 0) %}a{% else %}b{% endif %}", "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}x{% else %}y{% endif %}{% endfor %}",
    "{% set x = 7 % 4 %}{{ x }}", "{% set x = '%s' % 'a' if true else 'b' % 2 %}{{ x }}", "{{ '%s' % ('a' if true else 'b') }}", "{{ '%s' % messages[0].content.split('\\n')[0] }}", "{{ ('%s' % 'a').upper() }}", "{{ '%s' % 'a' in ['a'] }}", "{{ not '%s' % 'a' == 'b' }}", "{{ dict(a='%s' % 'x', b=7 % 4) }}", "{{ 'a%sb' % ('x') ~ 'c%d' % 3 }}",
    "{%- for t in tools %}\n{{- t | tojson(indent=4) }}\n{{- '\\n\\n' }}\n{%- endfor %}", "{{ tools | map(attribute='function') | map(attribute='name') | join(', ') }}",
    "{%- set loop_messages = messages[1:] if messages[0].role == 'system' else messages %}{% for m in loop_messages %}{{ m.role }} {% endfor %}",
    "{{ messages | selectattr('tool_calls') | list | length }}{{ messages | rejectattr('tool_calls') | list | length }}", "{% set m = messages[1] %}{{ m.content if m.content is string else m.content | map(attribute='text') | join }}",
    "{% set items = [{'type': 'text', 'text': 'a'}, {'type': 'image'}] %}{% for p in items | selectattr('type', 'equalto', 'text') %}{{ p['text'] }}{% endfor %}",
    "{{ {} is mapping }}{{ {}.items() | list | length }}", "{{ '\\n' }}{{ '\\\\n' }}", "{{ 'a' if messages[-1]['role'] == 'assistant' and messages[-1].content.endswith('.') }}",
    "{{ bos_token + 'a' }}{{ eos_token }}", "{{ [bos_token, eos_token] | join('') }}", "{{ pad_token is defined }}",
    "{%- if not add_generation_prompt is defined %}{%- set add_generation_prompt = false %}{%- endif %}{{ add_generation_prompt }}", "{% set add_generation_prompt = false %}{{ add_generation_prompt }}",
    "{{ 1 }}{{ 2 }}\n\n{{ 3 }}\n", "{% set x = 'a\nb' %}{{ x }}", "{{ 'a\nb' }}", "{{ 'a' -}}\n\n{{- 'b' }}", "é{{ 'ü' }}\U0001F30A", "{{ 'é' | length }}{{ '\U0001F30A' | length }}{{ '\U0001F30A'[0] }}",
    "{% import 'x' as y %}", "{% include 'x' %}", "{% extends 'x' %}", "{% nope %}", "{{ nope() }}", "{{ 1 +", "{% if %}", "{% if true %}", "{{ 'a' | nope }}", "{{ 'a' is nope }}",
    "{% if false %}{{ 'a' | nope }}{% endif %}x", "{% if false %}{{ nope() }}{% endif %}x", "{% if false %}{{ 'a' is nope }}{% endif %}x",
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{{ ns.last }}",
    "{% set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}{% for message in messages[::-1] %}{% set index = (messages|length - 1) - loop.index0 %}{% if ns.multi_step_tool and message.role == 'user' and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}{% set ns.multi_step_tool = false %}{% set ns.last_query_index = index %}{% endif %}{% endfor %}{{ ns.last_query_index }}",
    "{% for c in messages[2].tool_calls %}{% set f = c.function if c.function is defined else c %}{{ f.name }}({% for k, v in f.arguments.items() %}{{ k }}={{ v | tojson if v is not string else v }}{% if not loop.last %}, {% endif %}{% endfor %}){% endfor %}",
    "{%- macro render(v, d=0) -%}{%- if v is mapping -%}{ {%- for k, x in v | dictsort -%}{{ k }}:{{ render(x, d + 1) }}{%- if not loop.last %},{% endif -%}{%- endfor -%} }{%- elif v is iterable and v is not string -%}[{{ v | map('string') | join(',') }}]{%- else -%}{{ v }}{%- endif -%}{%- endmacro -%}{{ render(" + P + ") }}",
    "{% set d = dict() %}{{ d }}{{ d | length }}", "{% set d = {'a': 1} %}{{ dict(d, **{'b': 2}) }}", "{{ dict(messages[0], extra=1).keys() | list }}", "{% macro f(a, b) %}{{ a }}{{ b }}{% endmacro %}{{ f(*[1, 2]) }}{{ f(**{'a': 1, 'b': 2}) }}",
    "{{ messages[1].list[0] + messages[1].list[-1] }}", "{{ 'x' ~ 1.0 ~ 2 ~ none }}", "{{ (1, 2) ~ [1] }}", "{{ 3 | string + 'a' }}", "{{ -1 | abs }}", "{{ 2 ** 3 ** 2 }}", "{{ -2 ** 2 }}", "{{ 1 - 1 - 1 }}", "{{ not true == false }}", "{{ 'a' ~ 1 + 2 }}", "{{ 1 ~ 2 * 3 }}", "{{ 1 if true else 2 if false else 3 }}", "{{ ('a', 'b') | join }}", "{{ 1, 2 }}", "{{ a.b.c is defined }}", "{{ missing.x }}", "{{ (missing | default({})).x is defined }}",
]

# What is refused or written otherwise here, and no template of the hub that we know of needs: the test holds the list.
different = set(r"""
{{ +3 }}
{{ range(3) }}
{{ '{a} {b!r}'.format(a=1, b='x') }}
{{ '{:,} {:x} {:08b} {:.1%} {:e}'.format(1234567, 255, 5, 0.256, 12345.678) }}
{{ '%d' % 3.7 }}
{{ '%r %s' % ('a', none) }}
{{ '%*d' % (5, 3) }}
{{ 'a b c d e f' | truncate(5) }}
{{ 'foo bar baz qux' | truncate(9) }}
{{ 'foo bar baz qux' | truncate(9, true) }}
{{ 'foo bar baz qux' | truncate(9, true, '') }}
{{ 'foo bar baz qux' | wordwrap(7) }}
{{ '<p>a</p>' | striptags }}
{{ 'a b&c' | urlencode }}
{{ 1000 | filesizeformat }}
{{ [1, 2] | pprint }}
{{ messages | random | length > 0 }}
{{ {'a': 1} | xmlattr }}
{{ 'a' | forceescape }}
{{ messages[1].extra.items() is sequence }}
{{ (messages | map(attribute='role')) is sequence }}
{{ self is defined }}
{{ ['\u2028', '\x7f', '\xa0', '\U0001F30A'] | string }}
{{ lipsum is defined }}
{{ 1.5.is_integer() }}
{{ (3).bit_length() }}
{% set ns = namespace(a=1) %}{{ ns }}
{% macro f(x) %}{{ x }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1, 2, a=3) }}
{% macro f(a, b=a) %}{{ b }}{% endmacro %}{{ f(1) }}
{% macro f(m) %}{% for x in m %}{{ x }}{% endfor %}{% endmacro %}{{ f([1, 2]) ~ 'x' }}{{ f.name }}{{ f.arguments }}
{{ 1, 2 }}
""".replace("\\\\", "\\").strip().split("\n"))

cases = [f"{{{{ {e} }}}}" for e in expressions] + templates
table = []
for source in cases:
    try:
        text = _compile_jinja_template(source).render(**context)
    except Exception as problem:
        text = None
    if text is not None and (" at 0x" in text or "<class" in text):
        text = None  # Python's own objects printed
    table.append([source, text])
assert not different - set(cases), different - set(cases)
here = pathlib.Path(__file__).parent
rows = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in table)
(here / "dialect.json").write_text(f'{{\n "context": {json.dumps(context, ensure_ascii=False)},\n "different": {json.dumps(sorted(different))},\n "table": [\n  {rows}\n ]\n}}\n')
print(len(table), "cases,", sum(t is None for _, t in table), "refused")
