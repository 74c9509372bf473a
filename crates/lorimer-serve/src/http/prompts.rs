//! From what is asked to the tokens of prompts.

use std::sync::Arc;

use lorimer_model::text::chat::ChatTemplate;
use lorimer_model::text::messages::{normalise, normalise_tools};
use lorimer_model::{Base, TextModel};
use serde_json::Value;

use super::app::App;
use super::error::ApiError;
use super::request::{Adapters, Chat, Common};
use super::shape::{Before, Place, offsets};
use crate::adapters::hosted::Hosted;

/// What `chat_template_kwargs` cannot set, because it has a place of its own in a request or none.
const OWN: [&str; 6] =
    ["messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"];

impl Chat {
    /// Refuses a conversation that is too long, whatever its tokens are.
    pub fn fits(&self, app: &App) -> Result<(), ApiError> {
        let texts = self.messages.iter().flatten().chain(self.tools.iter().flatten());
        app.fits("messages", texts.map(length).sum())
    }
}

/// Bytes of the texts in a value.
fn length(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(all) => all.iter().map(length).sum(),
        Value::Object(all) => all.iter().map(|(name, value)| name.len() + length(value)).sum(),
        _ => 0,
    }
}

/// The first of the adapters that has a chat template of its own.
pub fn own_template(adapters: &Adapters) -> Option<Arc<Hosted>> {
    adapters.0.iter().find_map(|(a, _)| a.template.is_some().then(|| a.clone()))
}

/// The template that writes a conversation: an adapter's own, or the base's for what is asked.
pub fn template_of<'a>(base: &'a Base, own: Option<&'a Hosted>, asked: &Chat) -> Result<&'a ChatTemplate, ApiError> {
    match own.and_then(|hosted| hosted.template.as_ref()) {
        Some(own) => Ok(own),
        None => base.text.template_for(asked.offered().is_some()).map_err(|e| ApiError::invalid(e.to_string())),
    }
}

/// The tokens of a conversation.
pub fn chat_tokens(
    text: &TextModel,
    template: &ChatTemplate,
    asked: &Chat,
    special: Option<bool>,
) -> Result<Vec<u32>, ApiError> {
    let written = conversation(template, asked)?;
    let encoded = text.encode(&written, special.unwrap_or(false));
    Ok(encoded.map_err(|e| ApiError::field("messages", e.to_string()))?.ids)
}

/// A conversation as the template writes it.
pub fn conversation(template: &ChatTemplate, asked: &Chat) -> Result<String, ApiError> {
    let of = |field: &'static str| move |problem: String| ApiError::field(field, problem);
    let messages = normalise(asked.messages.as_deref().unwrap_or_default());
    let messages = messages.map_err(|e| of("messages")(e.to_string()))?;
    let tools = asked.offered().map(|tools| normalise_tools(&Value::Array(tools.to_vec())));
    let tools = tools.transpose().map_err(|e| of("tools")(e.to_string()))?;
    let mut variables = asked.chat_template_kwargs.clone().unwrap_or_default();
    if let Some(name) = OWN.into_iter().find(|name| variables.contains_key(*name)) {
        let problem = format!("`chat_template_kwargs` cannot set `{name}`; a request has a field for what can be set");
        return Err(of("chat_template_kwargs")(problem));
    }
    if let Some(documents) = &asked.documents {
        variables.insert("documents".into(), Value::Array(documents.clone()));
    }
    let goes_on = asked.continue_final_message == Some(true);
    let begins = asked.add_generation_prompt.unwrap_or(!goes_on);
    let text = template.render_with(&messages, tools.as_ref(), &variables, begins);
    let mut text = text.map_err(|e| of("messages")(e.to_string()))?;
    if goes_on {
        // As transformers cuts it: after the last message's text, or after what the template has trimmed it to.
        let last = messages.last().and_then(|m| m.get("content")?.as_str()).unwrap_or_default();
        let at = text.rfind(last.trim()).filter(|_| !last.trim().is_empty());
        let Some(at) = at else {
            let problem = "the last message has no text, or its template changes it, so that nothing can go on with it";
            return Err(of("continue_final_message")(problem.into()));
        };
        let whole = text[at..].starts_with(last.trim_start());
        text.truncate(at + if whole { last.trim_start().len() } else { last.trim().len() });
    }
    Ok(text)
}

/// A prompt as it was given.
pub enum Given {
    /// A text.
    Text(String),
    /// A text's tokens.
    Tokens(Vec<u32>),
}

/// A prompt's tokens and, where it is echoed, its text with their places in it.
pub fn prompt(
    text: &TextModel,
    common: &Common,
    given: Given,
    echo: bool,
    longest: usize,
) -> Result<(Vec<u32>, Before), ApiError> {
    let failed = |e: lorimer_model::Error| ApiError::field("prompt", e.to_string());
    let (mut ids, given) = match given {
        Given::Tokens(ids) => (ids, None),
        Given::Text(given) => {
            let encoded = text.encode(&given, common.add_special_tokens.unwrap_or(true)).map_err(failed)?;
            (encoded.ids, Some((given, encoded.spans)))
        }
    };
    let all = ids.len();
    common.truncate(&mut ids, longest);
    if !echo {
        return Ok((ids, Before::default()));
    }
    let before = match given.filter(|_| ids.len() == all) {
        Some((text, spans)) => {
            let offsets = places(&text, &spans);
            Before { text, offsets }
        }
        None => {
            let special = common.text().special;
            let decoded = text.decode(&ids, special).map_err(failed)?;
            let mut end = Place::default();
            let mut offsets = offsets(text, special, &ids, &mut end);
            // A text does not have the space that its first word's token has.
            let more = end.characters.saturating_sub(decoded.chars().count());
            offsets.iter_mut().for_each(|at| *at = at.saturating_sub(more));
            Before { text: decoded, offsets }
        }
    };
    Ok((ids, before))
}

/// Where each token of a text begins in it, in characters: where the one before ends, or the letter of which it is a part begins. Tokenizers
/// leave spaces out of what a token covers.
fn places(text: &str, spans: &[(usize, usize)]) -> Vec<usize> {
    let (mut end, mut byte, mut character) = (0, 0, 0);
    let of = |&(from, to): &(usize, usize)| {
        let start = if from < to { from.min(end) } else { end };
        end = end.max(to);
        let between = |a: usize, b: usize| text.get(a..b).map_or(0, |t| t.chars().count());
        // Places go up but for letters that tokens share.
        character = character + between(byte, start) - between(start, byte);
        byte = start;
        character
    };
    spans.iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_stand_where_the_ones_before_end() {
        // `é x` with a token around it that the tokenizer adds, two for é, and one that leaves its space out.
        assert_eq!(places("é x", &[(0, 0), (0, 2), (0, 2), (3, 4), (0, 0)]), [0, 0, 0, 1, 3]);
        assert!(places("", &[]).is_empty());
        // What stands nowhere in the text makes nothing fail.
        assert_eq!(places("é", &[(1, 9), (5, 6)]).len(), 2);
    }
}
