//! Rows of every format and file.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::read::object;
use super::sample::message;
use super::*;
use crate::error::Result;

fn parse(value: Value) -> std::result::Result<Sample, String> {
    let row = object(value)?;
    sample(&row, Format::detect(&row).ok_or("unknown")?)
}

#[test]
fn every_format_is_told_by_its_keys() {
    let chat = |m: Vec<Value>| Ok(Sample::Chat { messages: m, tools: None, variables: Map::new() });
    let qa = || vec![message("user", "q"), message("assistant", "a")];
    assert_eq!(parse(json!({ "messages": qa() })), chat(qa()));
    assert_eq!(parse(json!({ "instruction": "q", "input": "", "output": "a" })), chat(qa()));
    assert_eq!(
        parse(json!({ "conversations": [{ "from": "human", "value": "q" }, { "from": "gpt", "value": "a" }] })),
        chat(qa())
    );
    assert_eq!(
        parse(json!({ "prompt": [message("user", "q")], "completion": [message("assistant", "a")] })),
        chat(qa())
    );
    // What the assistant says in the prompt is context.
    let context = json!({ "role": "assistant", "content": "a", "weight": 0 });
    assert_eq!(
        parse(json!({ "prompt": qa(), "completion": qa() })),
        chat(vec![message("user", "q"), context, message("user", "q"), message("assistant", "a")])
    );
    assert_eq!(
        parse(json!({ "prompt": "q", "completion": "a" })),
        Ok(Sample::Completion { prompt: "q".into(), completion: "a".into() })
    );
    assert_eq!(parse(json!({ "text": "t" })), Ok(Sample::Text("t".into())));
    let with =
        parse(json!({ "system": "s", "history": [["q", "a"]], "instruction": "q", "input": "x", "output": "a" }));
    assert_eq!(
        with,
        chat(vec![
            message("system", "s"),
            message("user", "q"),
            message("assistant", "a"),
            message("user", "q\nx"),
            message("assistant", "a")
        ])
    );
}

#[test]
fn bad_rows_say_what_is_wrong() {
    assert_eq!(parse(json!({ "messages": [{ "content": "x" }] })), Err("message 1 has no `role`".into()));
    assert_eq!(parse(json!({ "instruction": "q" })), Err("has no `output`".into()));
    assert_eq!(parse(json!({ "text": 3 })), Err("`text` should be a text, found a number".into()));
}

#[test]
fn files_of_every_kind_give_the_same_rows() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, content: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    let expected: Map<String, Value> = object(json!({ "prompt": "q, \"x\"", "completion": "a" })).unwrap();
    let files = [
        write("a.jsonl", "{\"prompt\": \"q, \\\"x\\\"\", \"completion\": \"a\"}\n\n"),
        write("a.json", "[{\"prompt\": \"q, \\\"x\\\"\", \"completion\": \"a\"}]"),
        write("a.csv", "prompt,completion\n\"q, \"\"x\"\"\",a\n"),
    ];
    for path in files {
        let rows = read_rows(&path, None).unwrap();
        assert_eq!(rows.len(), 1);
        assert_eq!(rows[0].value.as_ref().unwrap(), &expected, "{}", path.display());
    }
    let bad = write("b.jsonl", "{\"text\": \"x\"}\n{oops\n");
    let rows = read_rows(&bad, None).unwrap();
    assert!(rows[1].value.is_err() && rows[1].place == "line 2");
}
fn chat(messages: Vec<Value>) -> std::result::Result<Sample, String> {
    Ok(Sample::Chat { messages, tools: None, variables: Map::new() })
}

#[test]
fn turns_are_the_same_under_every_key_and_name() {
    let expected = chat(vec![message("user", "q"), message("assistant", "a")]);
    for list in ["messages", "conversations"] {
        for (role, content) in [("role", "content"), ("from", "value"), ("role", "value"), ("from", "content")] {
            for (user, assistant) in [("user", "assistant"), ("human", "gpt"), ("human", "model")] {
                let turns = json!([{ role: user, content: "q", "weight": null }, { content: "a", role: assistant }]);
                assert_eq!(parse(json!({ list: turns })), expected, "{list} {role} {user}");
                assert_eq!(parse(json!({ list: turns.to_string() })), expected, "{list} as JSON text");
            }
        }
    }
    let others = json!([{ "from": "system", "value": "s" }, { "from": "observation", "value": "4" }, { "role": "developer", "content": "d" }, { "role": "ipython", "content": "5" }]);
    let expected = [("system", "s"), ("tool", "4"), ("developer", "d"), ("ipython", "5")].map(|(r, c)| message(r, c));
    assert_eq!(parse(json!({ "conversations": others })), chat(expected.to_vec()));
    let refused =
        parse(json!({ "conversations": [{ "from": "human", "value": "q" }, { "from": "narrator", "value": "x" }] }));
    assert_eq!(refused, Err("message 2 is from `narrator`; expected human, gpt, system or tool".into()));
    assert_eq!(parse(json!({ "messages": [] })), Err("`messages` is empty".into()));
    let python = parse(json!({ "messages": "[{'role': 'user'}]" })).unwrap_err();
    assert!(python.starts_with("`messages` should be JSON, found a text that is not"), "{python}");
    let image = json!([{ "role": "user", "content": [{ "type": "text", "text": "x" }, { "type": "image" }] }]);
    assert!(
        parse(json!({ "messages": image })).unwrap_err().starts_with("message 1 has a content part 2 of type `image`")
    );
}

#[test]
fn weights_are_0_or_1_and_an_assistants() {
    let of =
        |role: &str, weight: Value| parse(json!({ "messages": [{ "role": role, "content": "x", "weight": weight }] }));
    for weight in [json!(0), json!(1), json!(0.0), json!(1.0)] {
        assert!(of("assistant", weight).is_ok());
    }
    for weight in [json!(0.5), json!(2), json!(-1), json!("0"), json!(true)] {
        let problem = of("assistant", weight.clone()).unwrap_err();
        assert_eq!(problem, format!("message 1 has the `weight` {weight}; expected 0 or 1"));
    }
    assert!(
        of("user", json!(0)).is_ok()
            && of("user", json!(1)).unwrap_err().contains("only an assistant's answers are trained on")
    );
}

#[test]
fn what_stands_beside_a_conversation_is_heeded() {
    let tools = json!([{ "type": "function", "function": { "name": "f" } }]);
    let turns = json!([message("user", "q"), message("assistant", "a")]);
    let expected = |tools: Option<&Value>, variables: Value| {
        let Value::Object(variables) = variables else { panic!() };
        Ok(Sample::Chat { messages: turns.as_array().unwrap().clone(), tools: tools.cloned(), variables })
    };
    for list in ["messages", "conversations"] {
        assert_eq!(parse(json!({ list: turns, "tools": tools })), expected(Some(&tools), json!({})));
        assert_eq!(parse(json!({ list: turns, "tools": tools.to_string() })), expected(Some(&tools), json!({})));
        assert_eq!(parse(json!({ list: turns, "functions": [{ "name": "f" }] })), expected(Some(&tools), json!({})));
        assert_eq!(parse(json!({ list: turns, "tools": "" })), expected(None, json!({})));
        let variables = json!({ "enable_thinking": false });
        assert_eq!(parse(json!({ list: turns, "chat_template_kwargs": variables })), expected(None, variables.clone()));
        assert_eq!(
            parse(json!({ list: turns, "chat_template_kwargs": variables.to_string() })),
            expected(None, variables)
        );
        assert!(
            parse(json!({ list: turns, "chat_template_kwargs": [1] }))
                .unwrap_err()
                .contains("`chat_template_kwargs` should be an object")
        );
        assert!(parse(json!({ list: turns, "tools": [3] })).unwrap_err().contains("tool 1 should be an object"));
        assert!(
            parse(json!({ list: turns, "tools": tools, "functions": [{}] })).unwrap_err().contains("keep one of them")
        );
    }
    let system = |first: &str| json!({ "system": "s", "messages": [message("system", first), message("user", "q")] });
    assert_eq!(parse(system("s")), chat(vec![message("system", "s"), message("user", "q")]));
    assert!(parse(system("t")).unwrap_err().contains("keep one of them"));
}

fn file(name: &str, content: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, content).unwrap();
    (folder, path)
}

fn values(name: &str, content: &[u8]) -> Result<Vec<Map<String, Value>>> {
    let (_folder, path) = file(name, content);
    read_rows(&path, None)?.into_iter().map(|row| row.value.clone().map_err(|e| row.error(e))).collect()
}

#[test]
fn json_is_told_by_its_content_and_marks_are_no_part_of_it() {
    let two = || ["x", "y"].map(|t| object(json!({ "text": t })).unwrap()).to_vec();
    let bom = "\u{feff}";
    let lines = [
        "{\"text\": \"x\"}\n{\"text\": \"y\"}",
        "{\"text\": \"x\"}\r\n\r\n{\"text\": \"y\"}\r\n",
        "\n  {\"text\": \"x\"}\n\n{\"text\": \"y\"}",
    ];
    let lists = ["[{\"text\": \"x\"},\n {\"text\": \"y\"}]", "\n [\n{\"text\": \"x\"}, {\"text\": \"y\"}\n]\n"];
    for content in lines.iter().chain(&lists) {
        for name in ["a.jsonl", "a.json", "a.ndjson"] {
            for mark in ["", bom] {
                assert_eq!(values(name, format!("{mark}{content}").as_bytes()).unwrap(), two(), "{name} {content:?}");
            }
        }
    }
    // Files that were put one after the other; an object around the list; one row alone.
    assert_eq!(
        values("a.jsonl", format!("{}\n{bom}{}", "{\"text\": \"x\"}", "{\"text\": \"y\"}").as_bytes()).unwrap(),
        two()
    );
    assert_eq!(values("a.json", b"{\"data\": [{\"text\": \"x\"}, {\"text\": \"y\"}]}").unwrap(), two());
    assert_eq!(values("a.json", b"{\n\"text\": \"x\"\n}").unwrap(), two()[..1]);
    assert_eq!(values("a.csv", format!("{bom}text\nx\ny\n").as_bytes()).unwrap(), two());
    for nothing in ["", " \n", bom] {
        assert!(values("a.jsonl", nothing.as_bytes()).unwrap().is_empty());
    }
    let problem = values("a.json", b"{\"text\": \"x\"} {").unwrap_err().to_string();
    assert!(problem.contains("a list of rows, or one row a line, was expected"), "{problem}");
}

#[test]
fn other_encodings_are_refused_by_name() {
    let little: Vec<u8> = "{\"text\": \"x\"}".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let big: Vec<u8> = "{\"text\": \"x\"}".encode_utf16().flat_map(u16::to_be_bytes).collect();
    let marked = |mark: &[u8], rest: &[u8]| [mark, rest].concat();
    for content in [little.clone(), big.clone(), marked(b"\xff\xfe", &little), marked(b"\xfe\xff", &big)] {
        for name in ["a.jsonl", "a.json", "a.csv"] {
            let problem = values(name, &content).unwrap_err().to_string();
            assert!(problem.ends_with("is text in UTF-16 or UTF-32; save it as UTF-8"), "{problem}");
        }
    }
}

#[test]
fn a_cell_is_a_text_and_a_list_is_read_where_one_belongs() {
    let csv = b"prompt,completion\n\"[1]\",\"{\"\"a\"\":  1}\"\n";
    let (_folder, path) = file("a.csv", csv);
    let rows = read_rows(&path, None).unwrap();
    let row = rows[0].value.as_ref().unwrap();
    let expected = Sample::Completion { prompt: "[1]".into(), completion: "{\"a\":  1}".into() };
    assert_eq!(sample(row, detect(&path, &rows).unwrap()), Ok(expected));
    let problem = values("a.csv", b"text,id,text\nx,1,y\n").unwrap_err().to_string();
    assert!(problem.ends_with("has two columns named `text` (the second is column 3)"), "{problem}");
    let csv = b"messages\n\"[{\"\"role\"\": \"\"user\"\", \"\"content\"\": \"\"[2]\"\"}]\"\n";
    let (_folder, path) = file("b.csv", csv);
    let rows = read_rows(&path, None).unwrap();
    assert_eq!(sample(rows[0].value.as_ref().unwrap(), Format::Messages), chat(vec![message("user", "[2]")]));
}

/// Parquet's structs have a null where a row has nothing (tests/goldens/make_rows.py).
#[test]
fn nulls_in_parquets_structs_are_nothing() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/nested.parquet");
    let rows = read_rows(&path, None).unwrap();
    let samples: Vec<_> = rows.iter().map(|row| sample(row.value.as_ref().unwrap(), Format::Messages)).collect();
    let call = |arguments: Value| json!({ "function": { "name": "tide", "arguments": arguments } });
    let calls = json!([call(json!({ "port": "Brest" })), call(json!({ "hours": 3 }))]);
    let tools = json!([{ "name": "tide", "parameters": { "port": { "type": "string" } } }]);
    let expected = [
        Sample::Chat {
            messages: vec![message("user", "q"), json!({ "role": "assistant", "tool_calls": calls })],
            tools: Some(tools),
            variables: Map::new(),
        },
        Sample::Chat {
            messages: vec![message("user", "r"), json!({ "role": "assistant", "content": "a", "weight": 0.0 })],
            tools: None,
            variables: object(json!({ "enable_thinking": false })).unwrap(),
        },
    ];
    assert_eq!(samples, expected.map(Ok));
}
