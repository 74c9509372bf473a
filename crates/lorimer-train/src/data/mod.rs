//! Training data: five shapes of rows in four kinds of files.

mod answers;
pub mod encode;

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use lorimer_model::files::read_bounded;
use lorimer_model::text::messages::{Refused, kind, normalise, normalise_tools};
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

/// Longest line of a JSONL file.
const MAX_LINE: u64 = 32 << 20;
/// Largest JSON or CSV file, which is held in memory whole.
const MAX_FILE: u64 = 2 << 30;

/// The shape of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// `{"messages": [{"role": …, "content": …}, …]}`, with optional `tools`.
    Messages,
    /// `{"instruction": …, "input": …, "output": …}`, with optional `system` and `history`.
    Alpaca,
    /// `{"conversations": [{"from": "human", "value": …}, …]}`, with optional `system`.
    Sharegpt,
    /// `{"prompt": …, "completion": …}`, texts or lists of messages.
    PromptCompletion,
    /// `{"text": …}`.
    Text,
}

impl Format {
    /// All formats with the key that tells them.
    pub const ALL: [(Format, &'static str); 5] = [
        (Format::Messages, "messages"),
        (Format::Sharegpt, "conversations"),
        (Format::Alpaca, "instruction"),
        (Format::PromptCompletion, "prompt"),
        (Format::Text, "text"),
    ];

    /// What `--format` takes.
    pub fn name(self) -> &'static str {
        match self {
            Format::Messages => "messages",
            Format::Alpaca => "alpaca",
            Format::Sharegpt => "sharegpt",
            Format::PromptCompletion => "prompt-completion",
            Format::Text => "text",
        }
    }

    /// The format of a row, by its keys.
    fn detect(row: &Map<String, Value>) -> Option<Format> {
        let found = Format::ALL.iter().find(|(_, key)| row.contains_key(*key)).map(|(f, _)| *f)?;
        (found != Format::PromptCompletion || row.contains_key("completion")).then_some(found)
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Format {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let found = Format::ALL.iter().map(|(f, _)| *f).find(|f| f.name() == s);
        found.ok_or_else(|| format!("`{s}` is not one of messages, alpaca, sharegpt, prompt-completion, text"))
    }
}

/// One row, understood.
#[derive(Clone, Debug, PartialEq)]
pub enum Sample {
    /// A conversation for the chat template.
    Chat {
        /// `{"role", "content"}` objects in the form of [`lorimer_model::text::messages`]. One with `"weight": 0` is context.
        messages: Vec<Value>,
        /// Tools for templates that know them.
        tools: Option<Value>,
        /// Further variables of the template (`chat_template_kwargs`).
        variables: Map<String, Value>,
    },
    /// Plain text to begin with and plain text to learn.
    Completion {
        /// Not supervised.
        prompt: String,
        /// Supervised.
        completion: String,
    },
    /// Plain text, all supervised.
    Text(String),
}

/// A row and where it stands.
#[derive(Clone, Debug)]
pub struct Row {
    /// The file.
    pub path: PathBuf,
    /// `line 3` or `row 3`.
    pub place: String,
    /// The row's keys and values, or why there are none.
    pub value: Result<Map<String, Value>, String>,
}

impl Row {
    /// The error of this row.
    pub fn error(&self, problem: impl Into<String>) -> Error {
        Error::Row { path: self.path.clone(), place: self.place.clone(), problem: problem.into() }
    }
}

fn object(value: Value) -> Result<Map<String, Value>, String> {
    match value {
        Value::Object(map) => Ok(map),
        other => Err(format!("a JSON object was expected, found {}", kind(&other))),
    }
}

/// Reads the rows of a file, its kind told by its extension: `.jsonl`, `.json`, `.csv`, `.parquet`.
/// `limit` stops after so many rows.
pub fn read_rows(path: &Path, limit: Option<usize>) -> Result<Vec<Row>> {
    let limit = limit.unwrap_or(usize::MAX);
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    if !path.is_file() {
        return Err(Error::data(path, "is no file; training data is a .jsonl, .json, .csv or .parquet file"));
    }
    if matches!(extension.as_str(), "jsonl" | "ndjson" | "json" | "csv") {
        check_encoding(path)?;
    }
    match extension.as_str() {
        // What a JSON file holds is told by its content: both names are used for both.
        "jsonl" | "ndjson" if first_byte(path)? == Some(b'[') => read_json(path, limit),
        "jsonl" | "ndjson" => read_jsonl(path, limit),
        "json" if one_row_a_line(path) => read_jsonl(path, limit),
        "json" => read_json(path, limit),
        "csv" => read_csv(path, limit),
        "parquet" => read_parquet(path, limit),
        other => Err(Error::data(
            path,
            format!("extension `{other}` is not one of jsonl, json, csv, parquet; rename the file to say what it is"),
        )),
    }
}

fn row(path: &Path, place: String, value: Result<Map<String, Value>, String>) -> Row {
    Row { path: path.to_path_buf(), place, value }
}

/// UTF-8's byte order mark, which some programs put before a text.
const BOM: &[u8] = b"\xef\xbb\xbf";

fn without_bom(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(BOM).unwrap_or(bytes)
}

/// Refuses texts in 16 or 32 bits a character, told by their mark or by their zero bytes.
fn check_encoding(path: &Path) -> Result<()> {
    let mut start = Vec::new();
    let file = File::open(path).map_err(lorimer_model::Error::io("read", path))?;
    file.take(4).read_to_end(&mut start).map_err(lorimer_model::Error::io("read", path))?;
    if start.starts_with(b"\xff\xfe") || start.starts_with(b"\xfe\xff") || start.contains(&0) {
        return Err(Error::data(path, "is text in UTF-16 or UTF-32; save it as UTF-8"));
    }
    Ok(())
}

/// The bytes from the first that is no blank on; None in a file of blanks.
fn first_byte(path: &Path) -> Result<Option<u8>> {
    let reader = BufReader::new(File::open(path).map_err(lorimer_model::Error::io("read", path))?);
    for byte in reader.bytes() {
        let byte = byte.map_err(lorimer_model::Error::io("read", path))?;
        if !byte.is_ascii_whitespace() && !BOM.contains(&byte) {
            return Ok(Some(byte));
        }
    }
    Ok(None)
}

fn read_jsonl(path: &Path, limit: usize) -> Result<Vec<Row>> {
    let mut reader = BufReader::new(File::open(path).map_err(lorimer_model::Error::io("read", path))?);
    let (mut rows, mut number) = (Vec::new(), 0usize);
    while rows.len() < limit {
        let mut line = Vec::new();
        let n = (&mut reader).take(MAX_LINE + 1).read_until(b'\n', &mut line);
        if n.map_err(lorimer_model::Error::io("read", path))? == 0 {
            break;
        }
        number += 1;
        if line.len() as u64 > MAX_LINE {
            return Err(Error::data(path, format!("line {number} is longer than {MAX_LINE} bytes")));
        }
        // Where files were put one after the other, a mark may stand before any line.
        let line = without_bom(&line);
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let value = serde_json::from_slice(line).map_err(|e| format!("is not JSON: {e}")).and_then(object);
        rows.push(row(path, format!("line {number}"), value));
    }
    Ok(rows)
}

/// Whether there are several lines and the first is an object by itself, so that the file holds one row a line.
fn one_row_a_line(path: &Path) -> bool {
    read_jsonl(path, 2).is_ok_and(|rows| rows.len() == 2 && rows[0].value.is_ok())
}

fn read_json(path: &Path, limit: usize) -> Result<Vec<Row>> {
    let bytes = read_bounded(path, MAX_FILE)?;
    let value: Value = serde_json::from_slice(without_bom(&bytes))
        .map_err(|e| Error::data(path, format!("is not JSON: {e}; a list of rows, or one row a line, was expected")))?;
    let items = match value {
        Value::Array(items) => items,
        Value::Object(mut map) => match map.remove("data") {
            Some(Value::Array(items)) => items,
            Some(other) => {
                return Err(Error::data(path, format!("should hold a list of rows as `data`, found {}", kind(&other))));
            }
            None => vec![Value::Object(map)],
        },
        other => return Err(Error::data(path, format!("should hold a list of rows, found {}", kind(&other)))),
    };
    Ok(items.into_iter().take(limit).enumerate().map(|(i, v)| row(path, format!("row {}", i + 1), object(v))).collect())
}

fn read_csv(path: &Path, limit: usize) -> Result<Vec<Row>> {
    let bytes = read_bounded(path, MAX_FILE)?;
    let mut reader = csv::ReaderBuilder::new().flexible(false).from_reader(without_bom(&bytes));
    let headers = reader.headers().map_err(|e| Error::data(path, format!("has no readable header line: {e}")))?.clone();
    if let Some((i, twice)) = headers.iter().enumerate().find(|(i, name)| headers.iter().take(*i).any(|n| n == *name)) {
        let twice: String = twice.chars().take(40).collect();
        return Err(Error::data(path, format!("has two columns named `{twice}` (the second is column {})", i + 1)));
    }
    let mut rows = Vec::new();
    for (i, record) in reader.records().take(limit).enumerate() {
        let line = record.as_ref().ok().and_then(|r| r.position()).map_or(i as u64 + 2, csv::Position::line);
        // A cell is a text, whatever it looks like; columns that hold lists are read as JSON where they are used.
        let value = record
            .map_err(|e| format!("is not CSV: {e}"))
            .map(|record| headers.iter().zip(record.iter()).map(|(k, v)| (k.to_string(), Value::from(v))).collect());
        rows.push(row(path, format!("line {line}"), value));
    }
    Ok(rows)
}

/// A row without the nulls inside its structs: Parquet's structs have the same fields in every row, and null where a row has
/// none.
fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            fields.into_iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k, without_nulls(v))).collect()
        }
        Value::Array(items) => items.into_iter().map(without_nulls).collect(),
        other => other,
    }
}

fn read_parquet(path: &Path, limit: usize) -> Result<Vec<Row>> {
    use parquet::file::reader::{FileReader, SerializedFileReader};
    let broken = |e: parquet::errors::ParquetError| {
        let text: String = e.to_string().lines().next().unwrap_or_default().chars().take(200).collect();
        Error::data(path, format!("is not a readable Parquet file: {text}"))
    };
    let file = File::open(path).map_err(lorimer_model::Error::io("read", path))?;
    let reader = SerializedFileReader::new(file).map_err(broken)?;
    let mut rows = Vec::new();
    for (i, record) in reader.get_row_iter(None).map_err(broken)?.take(limit).enumerate() {
        let value = without_nulls(record.map_err(broken)?.to_json_value());
        rows.push(row(path, format!("row {}", i + 1), object(value)));
    }
    Ok(rows)
}

/// The format of a file's rows: that of the first row that has one.
pub fn detect(path: &Path, rows: &[Row]) -> Result<Format> {
    let mut readable = rows.iter().filter_map(|r| r.value.as_ref().ok());
    if let Some(format) = readable.clone().find_map(Format::detect) {
        return Ok(format);
    }
    let keys = readable.next().map(|row| {
        let keys: Vec<String> = row.keys().take(8).map(|k| k.chars().take(40).collect()).collect();
        keys.join(", ")
    });
    if keys.is_none()
        && let Some(first) = rows.first()
        && let Err(problem) = &first.value
    {
        return Err(first.error(problem.clone()));
    }
    let known: Vec<_> = Format::ALL.iter().map(|(f, key)| format!("`{key}` ({f})")).collect();
    Err(Error::data(
        path,
        match keys {
            Some(keys) => format!("its rows have the keys {keys}; expected one of {}", known.join(", ")),
            None => "holds no rows".to_string(),
        },
    ))
}

fn text<'a>(row: &'a Map<String, Value>, key: &str) -> Result<&'a str, String> {
    match row.get(key) {
        Some(Value::String(s)) => Ok(s),
        Some(other) => Err(format!("`{key}` should be a text, found {}", kind(other))),
        None => Err(format!("has no `{key}`")),
    }
}

fn optional_text<'a>(row: &'a Map<String, Value>, key: &str) -> Result<Option<&'a str>, String> {
    match row.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(s)) if s.is_empty() => Ok(None),
        Some(_) => text(row, key).map(Some),
    }
}

/// A column that holds a list or an object, which files of texts hold as JSON. None where it is missing, null or empty text.
fn structured(row: &Map<String, Value>, key: &str) -> Result<Option<Value>, String> {
    match row.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if text.trim().is_empty() => Ok(None),
        Some(Value::String(text)) => match serde_json::from_str(text) {
            Ok(Value::Null) => Ok(None),
            Ok(value) => Ok(Some(value)),
            Err(e) => Err(format!("`{key}` should be JSON, found a text that is not: {e}")),
        },
        Some(value) => Ok(Some(value.clone())),
    }
}

/// Names that data sets have for the two sides of a conversation, whatever key they stand under.
fn side(name: &str) -> Option<&'static str> {
    match name {
        "human" | "user" => Some("user"),
        "gpt" | "assistant" | "chatgpt" | "model" | "bing" => Some("assistant"),
        _ => None,
    }
}

/// One turn with the keys `role` and `content`, which may come as `from` and `value`.
fn turn(turn: &Value) -> Result<Value, String> {
    let fields = turn.as_object().ok_or_else(|| format!("should be an object, found {}", kind(turn)))?;
    let mut fields: Map<String, Value> =
        fields.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.clone(), v.clone())).collect();
    if !fields.contains_key("role")
        && let Some(from) = fields.shift_remove("from")
    {
        let name = from.as_str().ok_or_else(|| format!("should have a text as `from`, found {}", kind(&from)))?;
        let role = match name {
            "system" | "developer" => name,
            "tool" | "function" | "observation" => "tool",
            other => side(other).ok_or_else(|| {
                let other: String = other.chars().take(40).collect();
                format!("is from `{other}`; expected human, gpt, system or tool")
            })?,
        };
        fields.shift_insert(0, "role".into(), role.into());
    } else if let Some(role) = fields.get("role").and_then(Value::as_str).and_then(side) {
        fields.insert("role".into(), role.into());
    }
    if !fields.contains_key("content")
        && let Some(value) = fields.shift_remove("value")
    {
        fields.insert("content".into(), value);
    }
    Ok(Value::Object(fields))
}

/// A list of messages in their normal form. Only an assistant's may have a weight, of 0 or 1.
fn messages(list: Value, key: &str) -> Result<Vec<Value>, String> {
    let Value::Array(list) = list else {
        return Err(format!("`{key}` should be a list of messages, found {}", kind(&list)));
    };
    if list.is_empty() {
        return Err(format!("`{key}` is empty"));
    }
    let turns =
        list.iter().enumerate().map(|(i, m)| turn(m).map_err(|problem| Refused::message(i, problem).to_string()));
    let list = normalise(&turns.collect::<Result<Vec<_>, _>>()?).map_err(|e| e.to_string())?;
    for (i, message) in list.iter().enumerate() {
        let Some(weight) = message.get("weight") else { continue };
        if !matches!(weight.as_f64(), Some(w) if w == 0.0 || w == 1.0) {
            return Err(Refused::message(i, format!("has the `weight` {weight}; expected 0 or 1")).to_string());
        }
        if message["role"] != "assistant" && weight.as_f64() != Some(0.0) {
            let problem = "has a `weight` of 1, though only an assistant's answers are trained on; take it away";
            return Err(Refused::message(i, problem).to_string());
        }
    }
    Ok(list)
}

fn message(role: &str, content: &str) -> Value {
    json!({ "role": role, "content": content })
}

/// A conversation with what its row has beside it: `system`, `tools` (or `functions`, OpenAI's older name) and
/// `chat_template_kwargs`.
fn conversation(row: &Map<String, Value>, turns: Vec<Value>) -> Result<Sample, String> {
    let mut messages = turns;
    if let Some(system) = optional_text(row, "system")? {
        match messages.first().filter(|m| m["role"] == "system") {
            None => messages.insert(0, message("system", system)),
            Some(first) if first["content"] == system => {}
            Some(_) => return Err("has a `system` and another system message at the start; keep one of them".into()),
        }
    }
    let mut tools = match row.get("tools") {
        Some(tools) => normalise_tools(tools).map_err(|e| e.to_string())?,
        None => Value::Null,
    };
    if let Some(functions) = structured(row, "functions")? {
        if !tools.is_null() {
            return Err("has `tools` and `functions`, which mean the same; keep one of them".into());
        }
        let Value::Array(functions) = functions else {
            return Err(format!("`functions` should be a list of objects, found {}", kind(&functions)));
        };
        let list = functions.into_iter().map(|f| json!({ "type": "function", "function": f })).collect();
        tools = normalise_tools(&list).map_err(|e| e.to_string())?;
    }
    let variables = match structured(row, "chat_template_kwargs")? {
        None => Map::new(),
        Some(Value::Object(variables)) => variables,
        Some(other) => return Err(format!("`chat_template_kwargs` should be an object, found {}", kind(&other))),
    };
    Ok(Sample::Chat { messages, tools: Some(tools).filter(|t| !t.is_null()), variables })
}

/// Understands a row in a given format; the error says what is wrong with it.
pub fn sample(row: &Map<String, Value>, format: Format) -> Result<Sample, String> {
    let list = |key: &str| messages(structured(row, key)?.ok_or_else(|| format!("has no `{key}`"))?, key);
    match format {
        Format::Messages => conversation(row, list("messages")?),
        Format::Sharegpt => conversation(row, list("conversations")?),
        Format::Alpaca => {
            let mut turns = Vec::new();
            if let Some(history) = structured(row, "history")? {
                let pairs = history
                    .as_array()
                    .ok_or_else(|| format!("`history` should be a list, found {}", kind(&history)))?;
                for pair in pairs {
                    match pair.as_array().map(Vec::as_slice) {
                        Some([Value::String(q), Value::String(a)]) => {
                            turns.extend([message("user", q), message("assistant", a)])
                        }
                        _ => return Err("`history` should hold pairs of texts".into()),
                    }
                }
            }
            let instruction = text(row, "instruction")?;
            let user = match optional_text(row, "input")? {
                Some(input) => format!("{instruction}\n{input}"),
                None => instruction.to_string(),
            };
            turns.extend([message("user", &user), message("assistant", text(row, "output")?)]);
            conversation(row, turns)
        }
        Format::PromptCompletion => match (row.get("prompt"), row.get("completion")) {
            (Some(prompt @ Value::Array(_)), Some(completion @ Value::Array(_))) => {
                // The prompt's messages are context, also the assistant's.
                let mut turns = messages(prompt.clone(), "prompt")?;
                for fields in turns.iter_mut().filter(|m| m["role"] == "assistant").filter_map(Value::as_object_mut) {
                    fields.entry("weight").or_insert(0.into());
                }
                turns.extend(messages(completion.clone(), "completion")?);
                conversation(row, turns)
            }
            _ => Ok(Sample::Completion {
                prompt: text(row, "prompt")?.into(),
                completion: text(row, "completion")?.into(),
            }),
        },
        Format::Text => Ok(Sample::Text(text(row, "text")?.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(value: Value) -> Result<Sample, String> {
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
    fn chat(messages: Vec<Value>) -> Result<Sample, String> {
        Ok(Sample::Chat { messages, tools: None, variables: Map::new() })
    }

    #[test]
    fn turns_are_the_same_under_every_key_and_name() {
        let expected = chat(vec![message("user", "q"), message("assistant", "a")]);
        for list in ["messages", "conversations"] {
            for (role, content) in [("role", "content"), ("from", "value"), ("role", "value"), ("from", "content")] {
                for (user, assistant) in [("user", "assistant"), ("human", "gpt"), ("human", "model")] {
                    let turns =
                        json!([{ role: user, content: "q", "weight": null }, { content: "a", role: assistant }]);
                    assert_eq!(parse(json!({ list: turns })), expected, "{list} {role} {user}");
                    assert_eq!(parse(json!({ list: turns.to_string() })), expected, "{list} as JSON text");
                }
            }
        }
        let others = json!([{ "from": "system", "value": "s" }, { "from": "observation", "value": "4" }, { "role": "developer", "content": "d" }, { "role": "ipython", "content": "5" }]);
        let expected =
            [("system", "s"), ("tool", "4"), ("developer", "d"), ("ipython", "5")].map(|(r, c)| message(r, c));
        assert_eq!(parse(json!({ "conversations": others })), chat(expected.to_vec()));
        let refused = parse(
            json!({ "conversations": [{ "from": "human", "value": "q" }, { "from": "narrator", "value": "x" }] }),
        );
        assert_eq!(refused, Err("message 2 is from `narrator`; expected human, gpt, system or tool".into()));
        assert_eq!(parse(json!({ "messages": [] })), Err("`messages` is empty".into()));
        let python = parse(json!({ "messages": "[{'role': 'user'}]" })).unwrap_err();
        assert!(python.starts_with("`messages` should be JSON, found a text that is not"), "{python}");
        let image = json!([{ "role": "user", "content": [{ "type": "text", "text": "x" }, { "type": "image" }] }]);
        assert!(
            parse(json!({ "messages": image }))
                .unwrap_err()
                .starts_with("message 1 has a content part 2 of type `image`")
        );
    }

    #[test]
    fn weights_are_0_or_1_and_an_assistants() {
        let of = |role: &str, weight: Value| {
            parse(json!({ "messages": [{ "role": role, "content": "x", "weight": weight }] }))
        };
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
            assert_eq!(
                parse(json!({ list: turns, "functions": [{ "name": "f" }] })),
                expected(Some(&tools), json!({}))
            );
            assert_eq!(parse(json!({ list: turns, "tools": "" })), expected(None, json!({})));
            let variables = json!({ "enable_thinking": false });
            assert_eq!(
                parse(json!({ list: turns, "chat_template_kwargs": variables })),
                expected(None, variables.clone())
            );
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
                parse(json!({ list: turns, "tools": tools, "functions": [{}] }))
                    .unwrap_err()
                    .contains("keep one of them")
            );
        }
        let system =
            |first: &str| json!({ "system": "s", "messages": [message("system", first), message("user", "q")] });
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
                    assert_eq!(
                        values(name, format!("{mark}{content}").as_bytes()).unwrap(),
                        two(),
                        "{name} {content:?}"
                    );
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
}
