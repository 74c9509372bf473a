//! Calls of tools in answers: each family of models writes them in a form of its own, in the text.

use lorimer_model::TextModel;
use serde_json::{Value, json};

use super::form::Form;

/// How a family writes calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>`: Hermes, Qwen 2.5 and 3, SmolLM.
    Tagged,
    /// `[TOOL_CALLS]` and a list of such objects, or a name before each call's arguments: Mistral.
    Mistral,
    /// The answer is `{"name": …, "parameters": {…}}`, several with `;` between them, with or without `<|python_tag|>`: Llama 3.
    Llama,
}

/// The beginning of calls.
const TAG: (&str, &str) = ("<tool_call>", "</tool_call>");
const MISTRAL: &str = "[TOOL_CALLS]";
const PYTHON: &str = "<|python_tag|>";

impl Dialect {
    /// That of a chat template, if it has one.
    pub fn of(template: &str) -> Option<Self> {
        let has = |text: &str| template.contains(text);
        match () {
            () if has(TAG.0) => Some(Self::Tagged),
            () if has(MISTRAL) => Some(Self::Mistral),
            () if has(PYTHON) || has("ipython") => Some(Self::Llama),
            () => None,
        }
    }

    /// Whether calls begin with a special token, which texts are to show.
    pub fn is_special(self) -> bool {
        self != Self::Tagged
    }

    /// The form of an answer that is one call or, unless it is to be of `one` tool, several.
    pub fn form(self, tools: &[Tool], one: bool, text: &TextModel) -> Result<Form, String> {
        let arguments = if self == Self::Llama { "parameters" } else { "arguments" };
        let of = |tool: &Tool| {
            json!({
                "type": "object", "required": ["name", arguments], "additionalProperties": false,
                "properties": { "name": { "const": tool.name }, arguments: tool.parameters },
            })
        };
        let calls: Vec<Value> = tools.iter().map(of).collect();
        let call = match &calls[..] {
            [call] => call.clone(),
            _ => json!({ "anyOf": calls }),
        };
        // Written as models learn it, without room for more space.
        let written = json!({ "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": " });
        let with = |mut schema: Value| {
            schema["x-guidance"] = written.clone();
            schema
        };
        Ok(match self {
            Self::Tagged => {
                let more = if one { "" } else { " (\"\\n\" call)*" };
                let grammar = format!("start: call{more}\ncall: \"{}\\n\" body \"\\n{}\"", TAG.0, TAG.1);
                Form::Around(grammar, with(call))
            }
            Self::Mistral => {
                let Some(id) = (0..text.vocabulary() as u32).find(|&id| text.token_bytes(id) == MISTRAL.as_bytes())
                else {
                    return Err(format!("the tokenizer has no token `{MISTRAL}`"));
                };
                let most = if one { json!(1) } else { json!(16) };
                let list = json!({ "type": "array", "minItems": 1, "maxItems": most, "items": call });
                let before = if text.is_special(id) { format!("<[{id}]>") } else { format!("\"{MISTRAL}\"") };
                Form::Around(format!("start: {before} body"), with(list))
            }
            Self::Llama => Form::Around("start: body".into(), with(call)),
        })
    }
}

/// A tool that may be called.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// The schema of its arguments; any object where none is given.
    pub parameters: Value,
}

impl Tool {
    /// From an object as OpenAI has it, or the function alone.
    pub fn read(tool: &Value) -> Option<Self> {
        let function = tool.get("function").unwrap_or(tool);
        let parameters = function.get("parameters").filter(|p| p.as_object().is_some_and(|p| !p.is_empty()));
        Some(Self {
            name: function.get("name")?.as_str()?.to_string(),
            parameters: parameters.cloned().unwrap_or_else(|| json!({ "type": "object" })),
        })
    }
}

/// A call of a tool.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// The tool's name.
    pub name: String,
    /// Its arguments as JSON text.
    pub arguments: String,
}

/// Finds the calls in an answer as it comes. Text that is no call of a tool that there is stays text.
#[derive(Clone, Debug)]
pub struct CallReader {
    dialect: Dialect,
    tools: Vec<String>,
    /// Text that may belong to a call.
    held: String,
    /// Whether the held text is inside of a call.
    inside: bool,
    /// Whether anything but calls has been seen, where calls are all of an answer.
    plain: bool,
    found: bool,
    /// Whether there may be several.
    parallel: bool,
}

impl CallReader {
    /// For an answer that may call some tools, several or one.
    pub fn new(dialect: Dialect, tools: &[Tool], parallel: bool) -> Self {
        let tools = tools.iter().map(|tool| tool.name.clone()).collect();
        Self { dialect, tools, held: String::new(), inside: false, plain: false, found: false, parallel }
    }

    /// Whether the answer ends here: it has the one call that it may have.
    pub fn is_over(&self) -> bool {
        self.found && !self.parallel
    }

    /// What becomes certain with more of the answer: text, and calls after it.
    pub fn push(&mut self, text: &str) -> (String, Vec<Call>) {
        if self.is_over() {
            return (String::new(), Vec::new());
        }
        self.held.push_str(text);
        match self.dialect {
            Dialect::Tagged => self.tagged(),
            Dialect::Mistral => (self.until(MISTRAL), Vec::new()),
            Dialect::Llama => {
                if !self.inside && !self.plain {
                    let start = self.held.trim_start();
                    self.inside = start.starts_with('{') || start.starts_with(PYTHON);
                    self.plain = !self.inside && !PYTHON.starts_with(start);
                }
                (if self.plain { std::mem::take(&mut self.held) } else { String::new() }, Vec::new())
            }
        }
    }

    /// What is left where nothing comes any more.
    pub fn finish(&mut self) -> (String, Vec<Call>) {
        if self.is_over() {
            return (String::new(), Vec::new());
        }
        let held = std::mem::take(&mut self.held);
        let (start, body) = match (self.dialect, self.inside) {
            (Dialect::Tagged, true) => (TAG.0, held.as_str()),
            (Dialect::Mistral, true) => (MISTRAL, held.as_str()),
            (Dialect::Llama, true) => ("", held.as_str()),
            (_, false) => ("", ""),
        };
        self.inside = false;
        let mut calls = match self.dialect {
            Dialect::Mistral => self.mistral(body),
            _ => self.calls(body.trim().trim_start_matches(PYTHON)),
        };
        if !self.parallel {
            calls.truncate(1);
        }
        match calls.is_empty() {
            false => (String::new(), calls),
            // Space after calls is nobody's.
            true if self.found && held.trim().is_empty() => (String::new(), calls),
            true => (format!("{start}{held}"), calls),
        }
    }

    fn tagged(&mut self) -> (String, Vec<Call>) {
        let (mut text, mut calls) = (String::new(), Vec::new());
        loop {
            if !self.inside {
                text += &self.until(TAG.0);
            }
            let Some(end) = self.held.find(TAG.1).filter(|_| self.inside) else { return (text, calls) };
            let rest = self.held.split_off(end + TAG.1.len());
            let body = std::mem::replace(&mut self.held, rest);
            let own = self.calls(body[..end].trim());
            if own.is_empty() {
                text += &format!("{}{body}", TAG.0);
            }
            self.found |= !own.is_empty();
            calls.extend(own);
            self.inside = false;
            if self.is_over() {
                calls.truncate(1);
                self.held.clear();
                return (text, calls);
            }
        }
    }

    /// The text before a mark, without the space next to it; what may be the mark's beginning is held.
    fn until(&mut self, mark: &str) -> String {
        if self.inside {
            return String::new();
        }
        let end = match self.held.find(mark) {
            Some(at) => {
                self.inside = true;
                let rest = self.held.split_off(at + mark.len());
                let mut text = std::mem::replace(&mut self.held, rest);
                text.truncate(text[..at].trim_end().len());
                return if self.found { text.trim_start().to_string() } else { text };
            }
            None => {
                let part = (1..mark.len()).rev().find(|&n| self.held.ends_with(&mark[..n])).unwrap_or(0);
                self.held[..self.held.len() - part].trim_end().len()
            }
        };
        let rest = self.held.split_off(end);
        std::mem::replace(&mut self.held, rest)
    }

    /// Objects with a name and arguments, one after the other or in a list; none unless that is all of the text.
    fn calls(&self, text: &str) -> Vec<Call> {
        let (mut found, mut rest) = (Vec::new(), text.trim());
        while !rest.is_empty() {
            let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
            let Some(Ok(value)) = values.next() else { return Vec::new() };
            rest = rest[values.byte_offset()..].trim_start().trim_start_matches(';').trim_start();
            let all = if let Value::Array(all) = value { all } else { vec![value] };
            let calls: Option<Vec<Call>> = all.iter().map(|call| self.call(call)).collect();
            match calls {
                Some(calls) => found.extend(calls),
                None => return Vec::new(),
            }
        }
        found
    }

    fn call(&self, value: &Value) -> Option<Call> {
        let name = value.get("name")?.as_str().filter(|name| self.tools.iter().any(|tool| tool == name))?;
        let arguments = value.get("arguments").or_else(|| value.get("parameters"));
        let arguments = match arguments {
            None => "{}".to_string(),
            Some(Value::String(text)) => text.clone(),
            Some(value) => value.to_string(),
        };
        Some(Call { name: name.to_string(), arguments })
    }

    /// A list of calls, or `name{…}` and `name[ARGS]{…}` with the mark between them.
    fn mistral(&self, text: &str) -> Vec<Call> {
        if text.trim_start().starts_with('[') {
            return self.calls(text);
        }
        let one = |part: &str| {
            let (name, arguments) = part.trim().split_at(part.trim().find('{')?);
            let name = name.trim().trim_end_matches("[ARGS]");
            let arguments: Value = serde_json::from_str(arguments).ok()?;
            self.call(&json!({ "name": name, "arguments": arguments }))
        };
        text.split(MISTRAL).map(one).collect::<Option<Vec<_>>>().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tools() -> Vec<Tool> {
        let tool = |name: &str| json!({ "type": "function", "function": { "name": name } });
        [tool("tide"), tool("wind")].iter().map(|t| Tool::read(t).unwrap()).collect()
    }

    /// However the answer is cut into pieces: its text, and its calls.
    fn read(dialect: Dialect, answer: &str) -> (String, Vec<(String, String)>) {
        let mut results = Vec::new();
        for size in [1, 2, 3, 7, 1000] {
            let (mut reader, mut text, mut calls) =
                (CallReader::new(dialect, &tools(), true), String::new(), Vec::new());
            let letters: Vec<char> = answer.chars().collect();
            for piece in letters.chunks(size) {
                let (more, own) = reader.push(&piece.iter().collect::<String>());
                text += &more;
                calls.extend(own);
            }
            let (more, own) = reader.finish();
            text += &more;
            calls.extend(own);
            results.push((text, calls.into_iter().map(|c| (c.name, c.arguments)).collect::<Vec<_>>()));
        }
        assert!(results.iter().all(|r| *r == results[0]), "{answer}: {results:?}");
        results.swap_remove(0)
    }

    #[test]
    fn calls_are_found_as_families_write_them() {
        let tide = ("tide".to_string(), r#"{"port":"Brest"}"#.to_string());
        let wind = ("wind".to_string(), r#"{"at":[1,{"b":"}"}]}"#.to_string());
        let (one, two) = (
            r#"{"name": "tide", "arguments": {"port": "Brest"}}"#,
            r#"{"name": "wind", "arguments": {"at": [1, {"b": "}"}]}}"#,
        );
        let parameters = |text: &str| text.replace("arguments", "parameters");
        use Dialect::{Llama, Mistral, Tagged};
        for (dialect, answer, text, calls) in [
            (Tagged, format!("<tool_call>\n{one}\n</tool_call>"), "", vec![&tide]),
            (
                Tagged,
                format!("I look.\n<tool_call>\n{one}\n</tool_call>\n<tool_call>\n{two}\n</tool_call>\n"),
                "I look.",
                vec![&tide, &wind],
            ),
            // The end may be missing, where it ends the answer.
            (Tagged, format!("<tool_call>\n{one}"), "", vec![&tide]),
            (Tagged, "1 < 2 <tool and more\n".into(), "1 < 2 <tool and more\n", vec![]),
            (
                Tagged,
                "<tool_call>\n{\"name\": oops}\n</tool_call>".into(),
                "<tool_call>\n{\"name\": oops}\n</tool_call>",
                vec![],
            ),
            (
                Tagged,
                "<tool_call>{\"name\": \"none\"}</tool_call>".into(),
                "<tool_call>{\"name\": \"none\"}</tool_call>",
                vec![],
            ),
            (Mistral, format!("[TOOL_CALLS] [{one}, {two}]"), "", vec![&tide, &wind]),
            (Mistral, "Yes.[TOOL_CALLS]tide{\"port\": \"Brest\"}".into(), "Yes.", vec![&tide]),
            (
                Mistral,
                "[TOOL_CALLS]tide[ARGS]{\"port\": \"Brest\"}[TOOL_CALLS]wind[ARGS]{\"at\": [1, {\"b\": \"}\"}]}".into(),
                "",
                vec![&tide, &wind],
            ),
            (Mistral, "[TOOL_CALLS]oops".into(), "[TOOL_CALLS]oops", vec![]),
            (Llama, parameters(one), "", vec![&tide]),
            (Llama, format!("<|python_tag|>{}; {}", parameters(one), parameters(two)), "", vec![&tide, &wind]),
            (Llama, "{\"name\": \"Ada\"}".into(), "{\"name\": \"Ada\"}", vec![]),
            (Llama, "<|pyth".into(), "<|pyth", vec![]),
            (Llama, "No call.".into(), "No call.", vec![]),
        ] {
            let (found, own) = read(dialect, &answer);
            assert_eq!((found.as_str(), own.iter().collect::<Vec<_>>()), (text, calls), "{dialect:?}: {answer}");
        }
    }

    /// However the answer is cut, nothing is told after the first.
    #[test]
    fn one_call_ends_the_answer_where_one_is_allowed() {
        let call = r#"{"name": "tide", "arguments": {}}"#;
        for (dialect, answer) in [
            (Dialect::Tagged, format!("Yes. <tool_call>{call}</tool_call> and <tool_call>{call}</tool_call>")),
            (Dialect::Mistral, format!("Yes.[TOOL_CALLS][{call}, {call}]")),
            (Dialect::Llama, format!("{call}; {call}")),
        ] {
            for size in [1, 5, 1000] {
                let mut reader = CallReader::new(dialect, &tools(), false);
                let letters: Vec<char> = answer.chars().collect();
                let mut pieces: Vec<_> =
                    letters.chunks(size).map(|p| reader.push(&p.iter().collect::<String>())).collect();
                assert_eq!(reader.is_over(), dialect == Dialect::Tagged);
                pieces.push(reader.finish());
                let text: String = pieces.iter().map(|(text, _)| text.as_str()).collect();
                assert_eq!(
                    (text.as_str(), pieces.iter().map(|p| p.1.len()).sum::<usize>()),
                    (if dialect == Dialect::Llama { "" } else { "Yes." }, 1)
                );
            }
        }
    }

    #[test]
    fn templates_say_how_calls_are_written() {
        assert_eq!(Dialect::of("… <tool_call>\\n' …"), Some(Dialect::Tagged));
        assert_eq!(Dialect::of("… '[TOOL_CALLS]' …"), Some(Dialect::Mistral));
        assert_eq!(Dialect::of("Environment: ipython"), Some(Dialect::Llama));
        assert_eq!(Dialect::of("{{ messages }}"), None);
    }
}
