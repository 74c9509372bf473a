//! Rows out of files of JSON Lines, JSON, CSV and Parquet.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use lorimer_model::files::read_bounded;
use lorimer_model::text::messages::kind;
use serde_json::{Map, Value};

use super::row::{Format, Row};
use crate::error::{Error, Result};

/// Longest line of a JSONL file.
const MAX_LINE: u64 = 32 << 20;
/// Largest JSON or CSV file, which is held in memory whole.
const MAX_FILE: u64 = 2 << 30;

pub(super) fn object(value: Value) -> Result<Map<String, Value>, String> {
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
