//! From a row's keys and values to what is trained on: a conversation, or plain text.

use lorimer_model::text::messages::{Refused, kind, normalise, normalise_tools};
use serde_json::{Map, Value, json};

use super::row::{Format, Sample};

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

pub(super) fn message(role: &str, content: &str) -> Value {
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
