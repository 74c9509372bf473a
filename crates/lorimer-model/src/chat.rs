//! Chat templates (Jinja, as Hugging Face tokenizers carry them) rendered through minijinja.

use minijinja::value::{Kwargs, Serde, Value as Jinja};
use minijinja::{Environment, Error as JinjaError, ErrorKind};
use serde_json::Value;

use crate::error::{Error, Result};

/// Steps that one rendering may take; a template that loops longer is damaged or hostile.
const FUEL: u64 = 20_000_000;

/// A compiled chat template.
pub struct ChatTemplate {
    source: String,
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

/// JSON as Python's `json.dumps` writes it: `, ` and `: ` between items, non-ASCII kept.
fn python_json(value: &Value, indent: Option<usize>, depth: usize, out: &mut String) {
    let newline = |out: &mut String, depth: usize| {
        if let Some(width) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', width * depth));
        }
    };
    let separator = if indent.is_some() { "," } else { ", " };
    match value {
        Value::Array(items) if !items.is_empty() => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                out.push_str(if i > 0 { separator } else { "" });
                newline(out, depth + 1);
                python_json(item, indent, depth + 1, out);
            }
            newline(out, depth);
            out.push(']');
        }
        Value::Object(items) if !items.is_empty() => {
            out.push('{');
            for (i, (key, item)) in items.iter().enumerate() {
                out.push_str(if i > 0 { separator } else { "" });
                newline(out, depth + 1);
                out.push_str(&Value::from(key.as_str()).to_string());
                out.push_str(": ");
                python_json(item, indent, depth + 1, out);
            }
            newline(out, depth);
            out.push('}');
        }
        other => out.push_str(&other.to_string()),
    }
}

fn tojson(value: Jinja, options: Kwargs) -> Result<Jinja, JinjaError> {
    let indent: Option<usize> = options.get("indent")?;
    let _: Option<bool> = options.get("ensure_ascii")?;
    let _: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    let json = serde_json::to_value(&value)
        .map_err(|e| JinjaError::new(ErrorKind::BadSerialization, format!("tojson: {e}")))?;
    let mut out = String::new();
    python_json(&json, indent.map(|n| n.min(16)), 0, &mut out);
    Ok(Jinja::from_safe_string(out))
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("ChatTemplate").field(&self.source).finish()
    }
}

impl ChatTemplate {
    /// Compiles a template; `bos` and `eos` are the texts of those tokens ("" where there is none).
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self> {
        let mut environment = Environment::new();
        let mut syntax = minijinja::syntax::SyntaxConfig::builder();
        let syntax = syntax.trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| Error::Unsupported(one_line(&e)))?);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", |message: String| -> Result<Jinja, JinjaError> {
            Err(JinjaError::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| -> Result<String, JinjaError> {
            use std::fmt::Write as _;
            let mut text = String::new();
            write!(text, "{}", chrono::Local::now().format(&format)).map_err(|_| {
                JinjaError::new(ErrorKind::InvalidOperation, format!("strftime_now: bad format `{format}`"))
            })?;
            Ok(text)
        });
        environment
            .add_template_owned("chat", source.to_string())
            .map_err(|e| Error::Unsupported(format!("the chat template is not valid: {}", one_line(&e))))?;
        Ok(Self { source: source.to_string(), environment, bos: bos.to_string(), eos: eos.to_string() })
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders messages (`[{"role": …, "content": …}, …]`) to text. `tools` are passed on where the template knows them.
    pub fn render(&self, messages: &[Value], tools: Option<&Value>, add_generation_prompt: bool) -> Result<String> {
        let failed =
            |e: JinjaError| Error::Unsupported(format!("the chat template refuses the conversation: {}", one_line(&e)));
        let template = self.environment.get_template("chat").map_err(failed)?;
        let context = minijinja::context! {
            messages => Jinja::from(Serde(messages)),
            tools => Jinja::from(Serde(tools)),
            documents => Jinja::from(()),
            add_generation_prompt => add_generation_prompt,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
        };
        template.render(context).map_err(failed)
    }
}

fn one_line(error: &JinjaError) -> String {
    let text = error.to_string();
    text.lines().next().unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn json_is_written_as_python_writes_it() {
        let template = ChatTemplate::new("{{ messages[0].x | tojson }}", "", "").unwrap();
        let text = template.render(&[json!({ "x": { "a": [1, "ä<b>"], "b": null } })], None, false).unwrap();
        assert_eq!(text, r#"{"a": [1, "ä<b>"], "b": null}"#);
    }

    #[test]
    fn an_endless_template_ends() {
        let source = "{% for a in range(90000) %}{% for b in range(90000) %}x{% endfor %}{% endfor %}";
        let error = ChatTemplate::new(source, "", "").unwrap().render(&[], None, false).unwrap_err();
        assert!(error.to_string().contains("fuel"), "{error}");
    }

    #[test]
    fn raise_exception_carries_its_message() {
        let template = ChatTemplate::new("{{ raise_exception('roles must alternate') }}", "", "").unwrap();
        assert!(template.render(&[], None, false).unwrap_err().to_string().contains("roles must alternate"));
    }
}
