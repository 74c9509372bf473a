//! Which tools an answer may or has to call.

use lorimer_model::text::messages::normalise_tools;
use serde_json::Value;

use super::Chat;
use crate::generation::tools::Tool;
use crate::http::error::ApiError;
use crate::http::fields::{Field, Fields, wrong};

impl Chat {
    /// The tools that the template is to tell of, if any.
    pub(in crate::http) fn offered(&self) -> Option<&[Value]> {
        let wanted = self.tool_choice.as_ref().is_none_or(|choice| choice != "none");
        self.tools.as_deref().filter(|tools| wanted && !tools.is_empty())
    }

    /// The tools that an answer may call, as the template is told of them. What is none is refused where the conversation is written.
    pub(in crate::http) fn callable(&self) -> Vec<Tool> {
        let tools = self.offered().map(|tools| normalise_tools(&Value::Array(tools.to_vec())).unwrap_or_default());
        tools.iter().filter_map(Value::as_array).flatten().filter_map(Tool::read).collect()
    }

    /// The tools of which an answer has to call one, and whether it is to be one call; none where it need not call any.
    pub(in crate::http) fn demanded(&self) -> Result<Option<(Vec<Tool>, bool)>, ApiError> {
        let Some(choice) = self.tool_choice.as_ref().filter(|c| *c != "auto" && *c != "none") else { return Ok(None) };
        let mut tools = self.callable();
        let name = match choice {
            Value::String(text) if text == "required" => None,
            Value::Object(_) => {
                let mut fields = Fields::read(choice.clone(), "tool_choice")?;
                let kind: String = fields.needed("type")?;
                if kind != "function" {
                    return Err(wrong("tool_choice.type", "\"function\"", &Value::from(kind)));
                }
                let mut function = Fields::read(fields.needed("function")?, "tool_choice.function")?;
                let name: String = function.needed("name")?;
                function.done()?;
                fields.done()?;
                Some(name)
            }
            other => return Err(wrong("tool_choice", "\"auto\", \"none\", \"required\" or a function", other)),
        };
        if let Some(name) = &name {
            tools.retain(|tool| tool.name == *name);
        }
        match tools.is_empty() {
            true => {
                Err(ApiError::field("tool_choice", "`tool_choice` demands a call of a tool that is not among `tools`"))
            }
            false => Ok(Some((tools, name.is_some()))),
        }
    }
}
