//! The one form of chat messages that templates are given, in training and in serving.
//!
//! Data sets and clients write the same conversation in several ways: keys that hold null, arguments of tool calls as JSON
//! text, content in parts. [`normalise`] makes one of them, the one that transformers gives to a template, so that the
//! same conversation has the same tokens wherever it comes from.

use serde_json::{Map, Value, json};

/// Why messages or tools cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{at} {problem}")]
pub struct Refused {
    /// `message 2`, `tool 1` or `` `tools` ``, counted from 1.
    pub at: String,
    /// What was found and what was expected.
    pub problem: String,
}

impl Refused {
    /// Refusal of the message with this index.
    pub fn message(index: usize, problem: impl Into<String>) -> Self {
        Self { at: format!("message {}", index + 1), problem: problem.into() }
    }
}

/// What a JSON value is, as sentences say it.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Names under which a message carries its reasoning. Templates read the first; `thinking` is filled as well.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Messages in the form that templates are given:
///
/// - a key that holds null is left out (inside the arguments of a call null is a value and stays);
/// - `content` is a text: text parts are joined, other parts refused by their type; it may be missing only beside
///   `tool_calls`, `function_call` or reasoning;
/// - `tool_calls` is a list, and the `arguments` of each call a JSON value, `{}` where there are none;
/// - reasoning stands under `reasoning_content` and `thinking`, whichever name it came under.
///
/// Other keys (`name`, `tool_call_id`, `weight`, …) stay as they are.
///
/// # Errors
/// Names the first message that cannot be used and why.
pub fn normalise(messages: &[Value]) -> Result<Vec<Value>, Refused> {
    messages.iter().enumerate().map(|(i, m)| message(m).map_err(|problem| Refused::message(i, problem))).collect()
}

/// Tools in the form that templates are given: a list of objects. The list, each tool and a function's `parameters` may
/// come as JSON text; null and an empty text mean that there are none and give null.
///
/// # Errors
/// Names the tool that cannot be used and why.
pub fn normalise_tools(tools: &Value) -> Result<Value, Refused> {
    let whole = |problem: String| Refused { at: "`tools`".into(), problem };
    let tools = match tools {
        Value::Null => return Ok(Value::Null),
        Value::String(text) if text.trim().is_empty() => return Ok(Value::Null),
        other => parsed(other).map_err(&whole)?,
    };
    let list = match tools {
        Value::Null => return Ok(Value::Null),
        Value::Array(list) => list,
        other => return Err(whole(format!("should be a list of objects, found {}", kind(&other)))),
    };
    let tool = |(i, tool): (usize, Value)| {
        let at = |problem: String| Refused { at: format!("tool {}", i + 1), problem };
        let mut fields = match parsed(&tool).map_err(at)? {
            Value::Object(fields) => fields,
            other => return Err(at(format!("should be an object, found {}", kind(&other)))),
        };
        let function = match fields.get_mut("function") {
            Some(Value::Object(function)) => function,
            _ => &mut fields,
        };
        if let Some(parameters) = function.get_mut("parameters") {
            *parameters = parsed(parameters).map_err(|problem| at(format!("has `parameters` that {problem}")))?;
        }
        Ok(Value::Object(fields))
    };
    list.into_iter().enumerate().map(tool).collect()
}

/// The value that a JSON text stands for; values that are no text stand for themselves.
fn parsed(value: &Value) -> Result<Value, String> {
    match value {
        Value::String(text) => {
            serde_json::from_str(text).map_err(|e| format!("should be JSON, found a text that is not: {e}"))
        }
        other => Ok(other.clone()),
    }
}

fn without_nulls(fields: &Map<String, Value>) -> Map<String, Value> {
    fields.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.clone(), v.clone())).collect()
}

fn message(message: &Value) -> Result<Value, String> {
    let fields = message.as_object().ok_or_else(|| format!("should be an object, found {}", kind(message)))?;
    let mut fields = without_nulls(fields);
    match fields.get("role") {
        Some(Value::String(_)) => {}
        Some(other) => return Err(format!("should have a text as `role`, found {}", kind(other))),
        None => return Err("has no `role`".into()),
    }
    if let Some(content) = fields.get_mut("content") {
        *content = text_content(content)?.into();
    }
    if let Some(calls) = fields.get("tool_calls") {
        let calls = match parsed(calls).map_err(|e| format!("has `tool_calls` that {e}"))? {
            Value::Array(calls) => calls,
            other => return Err(format!("should have a list as `tool_calls`, found {}", kind(&other))),
        };
        let calls = calls.iter().enumerate();
        let calls = calls.map(|(i, call)| tool_call(call).map_err(|e| format!("has a tool call {} that {e}", i + 1)));
        fields.insert("tool_calls".into(), calls.collect::<Result<Value, String>>()?);
    }
    if let Some(call) = fields.get_mut("function_call") {
        *call = function(call).map_err(|e| format!("has a `function_call` that {e}"))?;
    }
    let reasoning = REASONING.iter().find_map(|name| fields.get(*name)).cloned();
    if let Some(reasoning) = &reasoning {
        fields.entry("thinking").or_insert_with(|| reasoning.clone());
        fields.insert("reasoning_content".into(), reasoning.clone());
    }
    let calls = ["tool_calls", "function_call"].iter().any(|name| fields.contains_key(*name));
    if !fields.contains_key("content") && !calls && reasoning.is_none() {
        return Err("has no `content`".into());
    }
    Ok(Value::Object(fields))
}

/// The text of `content`: a text, or the texts of its parts one after the other.
fn text_content(content: &Value) -> Result<String, String> {
    let parts = match content {
        Value::String(text) => return Ok(text.clone()),
        Value::Array(parts) => parts,
        other => return Err(format!("should have a text or a list of text parts as `content`, found {}", kind(other))),
    };
    let mut whole = String::new();
    for (i, part) in parts.iter().enumerate() {
        let at = i + 1;
        let fields = match part {
            Value::String(text) => {
                whole.push_str(text);
                continue;
            }
            Value::Object(fields) => without_nulls(fields),
            other => return Err(format!("has a content part {at} that should be an object, found {}", kind(other))),
        };
        match (fields.get("type").map(|t| t.as_str().unwrap_or_default()), fields.get("text")) {
            (None | Some("text" | "input_text" | "output_text"), Some(Value::String(text))) => whole.push_str(text),
            (None | Some("text" | "input_text" | "output_text"), found) => {
                let found = kind(found.unwrap_or(&Value::Null));
                return Err(format!("has a content part {at} that should have a text as `text`, found {found}"));
            }
            (Some(other), _) => {
                let other: String = other.chars().take(40).collect();
                return Err(format!(
                    "has a content part {at} of type `{other}`; this is a text model, which takes parts of type `text` only"
                ));
            }
        }
    }
    Ok(whole)
}

/// A call in OpenAI's form, `{"type": "function", "function": {"name", "arguments"}}`, or its inner object alone.
fn tool_call(call: &Value) -> Result<Value, String> {
    let fields = call.as_object().ok_or_else(|| format!("should be an object, found {}", kind(call)))?;
    let mut fields = without_nulls(fields);
    if let Some(inner) = fields.get_mut("function") {
        *inner = function(inner)?;
    } else if fields.contains_key("name") || fields.contains_key("arguments") {
        return function(call);
    }
    // Calls of other kinds (`custom`) have no arguments.
    Ok(Value::Object(fields))
}

/// `{"name", "arguments"}` with the arguments as a JSON value.
fn function(function: &Value) -> Result<Value, String> {
    let fields = function.as_object().ok_or_else(|| format!("should be an object, found {}", kind(function)))?;
    let mut fields = without_nulls(fields);
    let arguments = match fields.get("arguments") {
        None => json!({}),
        Some(Value::String(text)) if text.trim().is_empty() => json!({}),
        Some(given) => parsed(given).map_err(|e| format!("has `arguments` that {e}"))?,
    };
    if !(arguments.is_object() || arguments.is_array()) {
        return Err(format!("should have an object as `arguments` (or one as JSON text), found {}", kind(&arguments)));
    }
    fields.insert("arguments".into(), arguments);
    Ok(Value::Object(fields))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(message: Value) -> Result<Value, String> {
        normalise(&[message]).map(|mut list| list.remove(0)).map_err(|e| e.to_string())
    }

    #[test]
    fn a_null_key_is_a_missing_key() {
        let call = json!({ "id": "c", "type": "function", "function": { "name": "f", "arguments": { "a": null } } });
        let given = json!({ "role": "assistant", "content": null, "name": null, "tool_calls": [call] });
        assert_eq!(one(given), Ok(json!({ "role": "assistant", "tool_calls": [call] })));
        assert_eq!(one(json!({ "role": "user", "content": null })), Err("message 1 has no `content`".into()));
        assert_eq!(one(json!({ "role": null, "content": "x" })), Err("message 1 has no `role`".into()));
        assert_eq!(
            one(json!({ "role": "user", "content": "x", "tool_calls": null })),
            Ok(json!({ "role": "user", "content": "x" }))
        );
    }

    #[test]
    fn arguments_are_values_however_they_were_written() {
        let expected = json!({ "role": "assistant", "content": "", "tool_calls": [{ "id": "c", "function": { "name": "f", "arguments": { "a": 1 } } }] });
        for arguments in [json!({ "a": 1 }), json!("{\"a\": 1}"), json!(" {\"a\":1} ")] {
            let call = json!([{ "id": "c", "function": { "name": "f", "arguments": arguments } }]);
            let message = |calls: Value| json!({ "role": "assistant", "content": "", "tool_calls": calls });
            assert_eq!(one(message(call.clone())).as_ref(), Ok(&expected));
            assert_eq!(one(message(call.to_string().into())).as_ref(), Ok(&expected), "the calls as JSON text");
        }
        let flat = |arguments: Value| {
            let message = json!({ "role": "assistant", "tool_calls": [{ "name": "f", "arguments": arguments }] });
            one(message).map(|m| m["tool_calls"][0]["arguments"].clone())
        };
        assert_eq!(flat("{\"a\": 1}".into()), Ok(json!({ "a": 1 })));
        for nothing in [json!(null), json!(""), json!(" "), json!("{}")] {
            assert_eq!(flat(nothing), Ok(json!({})));
        }
        let older = one(json!({ "role": "assistant", "function_call": { "name": "f", "arguments": "{\"a\": 1}" } }));
        assert_eq!(older.unwrap()["function_call"]["arguments"], json!({ "a": 1 }));
    }

    #[test]
    fn arguments_that_are_no_json_are_refused_by_place() {
        for (arguments, expected) in [
            (json!("{oops"), "has `arguments` that should be JSON, found a text that is not"),
            (json!("\"{}\""), "should have an object as `arguments` (or one as JSON text), found a text"),
            (json!(3), "should have an object as `arguments` (or one as JSON text), found a number"),
        ] {
            let call = json!({ "function": { "name": "f", "arguments": arguments } });
            let error = normalise(&[
                json!({ "role": "user", "content": "x" }),
                json!({ "role": "assistant", "tool_calls": [{ "function": { "name": "f" } }, call] }),
            ]);
            let error = error.unwrap_err().to_string();
            assert!(error.starts_with("message 2 has a tool call 2 that ") && error.contains(expected), "{error}");
        }
        let no_list = json!({ "role": "assistant", "tool_calls": { "name": "f" } });
        assert_eq!(one(no_list), Err("message 1 should have a list as `tool_calls`, found an object".into()));
    }

    #[test]
    fn text_parts_are_one_text_and_others_are_refused_by_type() {
        let parts = |content: Value| one(json!({ "role": "user", "content": content })).map(|m| m["content"].clone());
        let text = json!({ "type": "text", "text": "Hi", "image_url": null });
        assert_eq!(parts(json!([text, { "type": "input_text", "text": " there" }, "!"])), Ok("Hi there!".into()));
        assert_eq!(parts(json!([])), Ok("".into()));
        assert_eq!(parts(json!([{ "text": "x" }])), Ok("x".into()));
        for other in ["image_url", "input_audio", "file", "image", "refusal"] {
            let error = parts(json!([text, { "type": other, other: { "url": "data:" } }])).unwrap_err();
            assert!(error.starts_with(&format!("message 1 has a content part 2 of type `{other}`; ")), "{error}");
        }
        for bad in [
            json!([{ "type": "text" }]),
            json!([{ "type": 3, "text": "x" }]),
            json!([3]),
            json!(3),
            json!({ "text": "x" }),
        ] {
            assert!(parts(bad.clone()).is_err(), "{bad}");
        }
    }

    #[test]
    fn reasoning_stands_under_the_names_that_templates_read() {
        for name in REASONING {
            let m = one(json!({ "role": "assistant", "content": "4", name: "2+2" })).unwrap();
            assert_eq!((&m["reasoning_content"], &m["thinking"]), (&json!("2+2"), &json!("2+2")), "{name}");
        }
        let both =
            one(json!({ "role": "assistant", "content": "4", "thinking": "b", "reasoning_content": "a" })).unwrap();
        assert_eq!((&both["reasoning_content"], &both["thinking"]), (&json!("a"), &json!("b")));
    }

    #[test]
    fn other_keys_stay_and_what_is_normal_is_left() {
        let messages = [
            json!({ "role": "developer", "content": "Be brief.", "name": "Ada" }),
            json!({ "role": "assistant", "content": "ok", "weight": 0 }),
            json!({ "role": "tool", "content": "4.1 m", "tool_call_id": "c1" }),
        ];
        let once = normalise(&messages).unwrap();
        assert_eq!(once, messages);
        assert_eq!(normalise(&once).unwrap(), once);
    }

    #[test]
    fn tools_are_a_list_however_they_were_written() {
        let parameters = json!({ "type": "object", "properties": {}, "required": null });
        let tools =
            json!([{ "type": "function", "function": { "name": "f", "parameters": parameters } }, { "name": "g" }]);
        assert_eq!(normalise_tools(&tools).as_ref(), Ok(&tools));
        assert_eq!(normalise_tools(&tools.to_string().into()).as_ref(), Ok(&tools));
        let each: Value = tools.as_array().unwrap().iter().map(|t| Value::from(t.to_string())).collect();
        assert_eq!(normalise_tools(&each).as_ref(), Ok(&tools));
        let inner = json!([{ "type": "function", "function": { "name": "f", "parameters": parameters.to_string() } }, { "name": "g" }]);
        assert_eq!(normalise_tools(&inner).as_ref(), Ok(&tools));
        for none in [json!(null), json!(""), json!("null")] {
            assert_eq!(normalise_tools(&none), Ok(Value::Null));
        }
        let refused = |tools: Value| normalise_tools(&tools).unwrap_err().to_string();
        assert_eq!(refused(json!({ "name": "f" })), "`tools` should be a list of objects, found an object");
        assert_eq!(refused(json!([{ "name": "f" }, 3])), "tool 2 should be an object, found a number");
        assert!(refused(json!("[oops")).starts_with("`tools` should be JSON, found a text that is not"));
        assert!(
            refused(json!([{ "name": "f", "parameters": "{" }]))
                .starts_with("tool 1 has `parameters` that should be JSON")
        );
    }
}
