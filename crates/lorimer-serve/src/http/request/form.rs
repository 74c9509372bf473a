//! What an answer is to be held to, in the words of OpenAI, vLLM and llama.cpp.

use serde_json::Value;

use super::Common;
use crate::generation::form::Form;
use crate::http::error::ApiError;
use crate::http::fields::{Field, Fields, wrong};

impl Common {
    /// The form asked for, and the field that asks for it.
    pub(in crate::http) fn form(&self) -> Result<Option<(&'static str, Form)>, ApiError> {
        let mut found: Vec<(&'static str, Form)> = Vec::new();
        if let Some(form) = self.response_format.clone().map(response_format).transpose()?.flatten() {
            found.push(("response_format", form));
        }
        for form in self.structured_outputs.clone().map(structured_outputs).transpose()?.into_iter().flatten() {
            found.push(("structured_outputs", form));
        }
        for (name, schema) in [("guided_json", &self.guided_json), ("json_schema", &self.json_schema)] {
            if let Some(given) = schema {
                found.push((name, schema_of(given.clone(), name)?));
            }
        }
        found.extend(self.guided_regex.clone().map(|regex| ("guided_regex", Form::Regex(regex))));
        if let Some(texts) = self.guided_choice.clone() {
            found.push(("guided_choice", choice(texts, "guided_choice")?));
        }
        found.extend(self.guided_grammar.clone().map(|text| ("guided_grammar", grammar(text))));
        // An empty one asks for nothing.
        let own = self.grammar.clone().filter(|text| !text.is_empty());
        found.extend(own.map(|text| ("grammar", Form::Gbnf(text))));
        match &found[..] {
            [_, (second, _), ..] => {
                let first = found[0].0;
                let fields = if first == *second { format!("`{first}`") } else { format!("`{first}` and `{second}`") };
                Err(ApiError::field(*second, format!("{fields} should say once what the answer is to be")))
            }
            _ => Ok(found.pop()),
        }
    }
}

/// `{"type": "text"}`, `{"type": "json_object"}` or `{"type": "json_schema", "json_schema": {"name", "schema", …}}`.
fn response_format(value: Value) -> Result<Option<Form>, ApiError> {
    let at = "response_format";
    let mut fields = Fields::read(value, at)?;
    let kind: String = fields.needed("type")?;
    let form = match kind.as_str() {
        "text" => None,
        // llama.cpp's may have a schema too.
        "json_object" => Some(match fields.take::<Value>("schema")? {
            Some(schema) => schema_of(schema, "response_format.schema")?,
            None => Form::object(),
        }),
        "json_schema" => {
            let at = "response_format.json_schema";
            let mut inner = Fields::read(fields.needed::<Value>("json_schema")?, at)?;
            let schema = schema_of(inner.needed("schema")?, "response_format.json_schema.schema")?;
            // Names for people, and whether the schema binds: here it always does.
            let _: (Option<String>, Option<String>) = (inner.take("name")?, inner.take("description")?);
            let _: Option<bool> = inner.take("strict")?;
            inner.done()?;
            Some(schema)
        }
        other => {
            let expected = "\"text\", \"json_object\" or \"json_schema\"";
            return Err(wrong("response_format.type", expected, &Value::from(other)));
        }
    };
    fields.done().map(|()| form)
}

/// vLLM's: one of `json`, `json_object`, `regex`, `choice` and `grammar`.
fn structured_outputs(value: Value) -> Result<Vec<Form>, ApiError> {
    let mut fields = Fields::read(value, "structured_outputs")?;
    let mut found = Vec::new();
    if let Some(schema) = fields.take::<Value>("json")? {
        found.push(schema_of(schema, "structured_outputs.json")?);
    }
    if fields.take::<bool>("json_object")? == Some(true) {
        found.push(Form::object());
    }
    found.extend(fields.take::<String>("regex")?.map(Form::Regex));
    if let Some(texts) = fields.take::<Vec<String>>("choice")? {
        found.push(choice(texts, "structured_outputs.choice")?);
    }
    found.extend(fields.take::<String>("grammar")?.map(grammar));
    fields.done()?;
    Ok(found)
}

/// A schema, or its text.
fn schema_of(value: Value, at: &str) -> Result<Form, ApiError> {
    let schema = match &value {
        Value::String(text) => serde_json::from_str(text)
            .map_err(|e| ApiError::field(at, format!("`{at}` is a text that is no JSON: {e}")))?,
        _ => value,
    };
    match schema.is_object() || schema.is_boolean() {
        true => Ok(Form::Schema(schema)),
        false => Err(wrong(at, "a JSON schema", &schema)),
    }
}

/// A grammar in either of the two syntaxes that vLLM takes: one has `::=` in its rules, the other never outside of texts.
fn grammar(text: String) -> Form {
    let rule = |line: &str| {
        line.split_once("::=")
            .is_some_and(|(name, _)| name.trim().chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c)))
    };
    if text.lines().any(rule) { Form::Gbnf(text) } else { Form::Lark(text) }
}

fn choice(texts: Vec<String>, at: &str) -> Result<Form, ApiError> {
    match texts.iter().all(|text| !text.is_empty()) && !texts.is_empty() {
        true => Ok(Form::Choice(texts)),
        false => Err(ApiError::field(at, format!("`{at}` should hold at least one text, and none that is empty"))),
    }
}
