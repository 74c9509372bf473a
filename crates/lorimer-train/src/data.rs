//! Training data: five shapes of rows in four kinds of files.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use lorimer_model::files::read_bounded;
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
        /// `{"role", "content"}` objects.
        messages: Vec<Value>,
        /// Tools for templates that know them.
        tools: Option<Value>,
    },
    /// Plain text to begin with and plain text to learn.
    Completion {
        /// Not learnt.
        prompt: String,
        /// Learnt.
        completion: String,
    },
    /// Plain text, all learnt.
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

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
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
    match extension.as_str() {
        "jsonl" | "ndjson" => read_jsonl(path, limit),
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
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let value = serde_json::from_slice(&line).map_err(|e| format!("is not JSON: {e}")).and_then(object);
        rows.push(row(path, format!("line {number}"), value));
    }
    Ok(rows)
}

fn read_json(path: &Path, limit: usize) -> Result<Vec<Row>> {
    let bytes = read_bounded(path, MAX_FILE)?;
    let value: Value = serde_json::from_slice(&bytes).map_err(|e| Error::data(path, format!("is not JSON: {e}")))?;
    let items = match value {
        Value::Array(items) => items,
        Value::Object(mut map) => match (map.len(), map.remove("data")) {
            (_, Some(Value::Array(items))) => items,
            _ => {
                return Err(Error::data(
                    path,
                    "should hold a list of rows, found one object (one row a line is `.jsonl`)",
                ));
            }
        },
        other => return Err(Error::data(path, format!("should hold a list of rows, found {}", kind(&other)))),
    };
    Ok(items.into_iter().take(limit).enumerate().map(|(i, v)| row(path, format!("row {}", i + 1), object(v))).collect())
}

fn read_csv(path: &Path, limit: usize) -> Result<Vec<Row>> {
    let bytes = read_bounded(path, MAX_FILE)?;
    let mut reader = csv::ReaderBuilder::new().flexible(false).from_reader(bytes.as_slice());
    let headers = reader.headers().map_err(|e| Error::data(path, format!("has no readable header line: {e}")))?.clone();
    let mut rows = Vec::new();
    for (i, record) in reader.records().take(limit).enumerate() {
        let line = record.as_ref().ok().and_then(|r| r.position()).map_or(i as u64 + 2, csv::Position::line);
        let value = record.map_err(|e| format!("is not CSV: {e}")).map(|record| {
            let cell = |(key, value): (&str, &str)| {
                // Lists and objects stand in cells as JSON.
                let parsed = value.starts_with(['[', '{']).then(|| serde_json::from_str(value).ok()).flatten();
                (key.to_string(), parsed.unwrap_or_else(|| Value::from(value)))
            };
            headers.iter().zip(record.iter()).map(cell).collect()
        });
        rows.push(row(path, format!("line {line}"), value));
    }
    Ok(rows)
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
        let value = record.map_err(broken)?.to_json_value();
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

fn messages(value: &Value, key: &str) -> Result<Vec<Value>, String> {
    let list =
        value.as_array().ok_or_else(|| format!("`{key}` should be a list of messages, found {}", kind(value)))?;
    for (i, message) in list.iter().enumerate() {
        let fields = message
            .as_object()
            .ok_or_else(|| format!("message {} should be an object, found {}", i + 1, kind(message)))?;
        if !fields.get("role").is_some_and(Value::is_string) {
            return Err(format!("message {} has no `role`", i + 1));
        }
        let content = fields.get("content").unwrap_or(&Value::Null);
        let fine = matches!(content, Value::String(_) | Value::Array(_)) || fields.contains_key("tool_calls");
        if !fine {
            return Err(format!("message {} should have a text as `content`, found {}", i + 1, kind(content)));
        }
    }
    Ok(list.clone())
}

fn message(role: &str, content: &str) -> Value {
    json!({ "role": role, "content": content })
}

/// Understands a row in a given format; the error says what is wrong with it.
pub fn sample(row: &Map<String, Value>, format: Format) -> Result<Sample, String> {
    let system = || -> Result<Vec<Value>, String> {
        Ok(optional_text(row, "system")?.map(|s| message("system", s)).into_iter().collect())
    };
    match format {
        Format::Messages => {
            let list = messages(row.get("messages").ok_or("has no `messages`")?, "messages")?;
            Ok(Sample::Chat { messages: list, tools: row.get("tools").filter(|t| !t.is_null()).cloned() })
        }
        Format::Sharegpt => {
            let mut list = system()?;
            let turns = row.get("conversations").ok_or("has no `conversations`")?;
            let turns =
                turns.as_array().ok_or_else(|| format!("`conversations` should be a list, found {}", kind(turns)))?;
            for (i, turn) in turns.iter().enumerate() {
                let turn = turn
                    .as_object()
                    .ok_or_else(|| format!("turn {} should be an object, found {}", i + 1, kind(turn)))?;
                let from = text(turn, "from").map_err(|e| format!("turn {}: {e}", i + 1))?;
                let role = match from {
                    "human" | "user" => "user",
                    "gpt" | "assistant" | "chatgpt" | "model" | "bing" => "assistant",
                    "system" => "system",
                    "tool" | "function" | "observation" => "tool",
                    other => {
                        let other: String = other.chars().take(40).collect();
                        return Err(format!("turn {} is from `{other}`; expected human, gpt, system or tool", i + 1));
                    }
                };
                list.push(message(role, text(turn, "value").map_err(|e| format!("turn {}: {e}", i + 1))?));
            }
            Ok(Sample::Chat { messages: list, tools: None })
        }
        Format::Alpaca => {
            let mut list = system()?;
            if let Some(history) = row.get("history").and_then(Value::as_array) {
                for pair in history {
                    match pair.as_array().map(Vec::as_slice) {
                        Some([Value::String(q), Value::String(a)]) => {
                            list.extend([message("user", q), message("assistant", a)])
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
            list.extend([message("user", &user), message("assistant", text(row, "output")?)]);
            Ok(Sample::Chat { messages: list, tools: None })
        }
        Format::PromptCompletion => match (row.get("prompt"), row.get("completion")) {
            (Some(prompt @ Value::Array(_)), Some(completion @ Value::Array(_))) => {
                let mut list = messages(prompt, "prompt")?;
                list.extend(messages(completion, "completion")?);
                Ok(Sample::Chat { messages: list, tools: None })
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
        let chat = |m: Vec<Value>| Ok(Sample::Chat { messages: m, tools: None });
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
}
