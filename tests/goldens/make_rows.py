#!/usr/bin/env python3
"""Makes nested.parquet beside it: conversations in Arrow's structs, whose fields are the same in every row.

usage: make_rows.py
"""
import pathlib

import pyarrow, pyarrow.parquet

call = lambda **arguments: {"id": None, "function": {"name": "tide", "arguments": arguments}}
rows = [
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call(port="Brest"), call(hours=3)]}],
     "tools": [{"name": "tide", "parameters": {"port": {"type": "string"}, "none": None}}], "chat_template_kwargs": None},
    {"messages": [{"role": "user", "content": "r"}, {"role": "assistant", "content": "a", "weight": 0.0}], "tools": None,
     "chat_template_kwargs": {"enable_thinking": False}},
]
text, number = pyarrow.string(), pyarrow.int64()
arguments = pyarrow.struct({"port": text, "hours": number})
calls = pyarrow.list_(pyarrow.struct({"id": text, "function": pyarrow.struct({"name": text, "arguments": arguments})}))
messages = pyarrow.list_(pyarrow.struct({"role": text, "content": text, "tool_calls": calls, "weight": pyarrow.float64()}))
parameters = pyarrow.struct({"port": pyarrow.struct({"type": text}), "none": text})
tools = pyarrow.list_(pyarrow.struct({"name": text, "parameters": parameters}))
schema = pyarrow.schema({"messages": messages, "tools": tools, "chat_template_kwargs": pyarrow.struct({"enable_thinking": pyarrow.bool_()})})
pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), pathlib.Path(__file__).parent / "nested.parquet")
