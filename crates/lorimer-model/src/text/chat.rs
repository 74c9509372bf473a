//! Chat templates (Jinja, as Hugging Face tokenizers carry them) rendered through minijinja.

mod bounds;
mod dialect;
mod methods;
mod translate;

use std::ops::Range;

use minijinja::value::{Serde, Value as Jinja};
use minijinja::{Environment, Error as JinjaError};
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Steps that one rendering may take; a template that loops longer is damaged or hostile.
const FUEL: u64 = 20_000_000;

/// Stack of the thread in which a template is compiled or rendered, in bytes: its values and tags may be nested as deeply as
/// their bounds allow.
const STACK: usize = 64 << 20;

/// Does some work on a thread with a large stack. A panic there is an error here.
fn on_large_stack<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread =
            std::thread::Builder::new().name("chat template".into()).stack_size(STACK).spawn_scoped(scope, work);
        let thread =
            thread.map_err(|e| Error::Unsupported(format!("no thread can be started for the chat template: {e}")))?;
        thread.join().unwrap_or_else(|_| Err(Error::Unsupported("the chat template cannot be computed".into())))
    })
}

/// Names of the template's forms (see [`translate::Translated`]).
const PLAIN: &str = "chat";
const MARKED: &str = "marked chat";

/// Variables that every template is given; `chat_template_kwargs` cannot have these names.
pub const RESERVED: [&str; 3] = ["messages", "tools", "add_generation_prompt"];

/// Longest text that is made of a conversation, in bytes.
pub const MAX_TEXT: usize = 32 << 20;

/// A compiled chat template.
pub struct ChatTemplate {
    source: String,
    marks_answers: bool,
    environment: Environment<'static>,
    bos: String,
    eos: String,
    tokens: Map<String, Value>,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("ChatTemplate").field(&self.source).finish()
    }
}

impl ChatTemplate {
    /// Compiles a template; `bos` and `eos` are the texts of those tokens ("" where there is none).
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self> {
        on_large_stack(|| Self::compile(source, bos, eos))
    }

    fn compile(source: &str, bos: &str, eos: &str) -> Result<Self> {
        let mut environment = Environment::new();
        let mut syntax = minijinja::syntax::SyntaxConfig::builder();
        let syntax = syntax.trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| Error::Unsupported(one_line(&e)))?);
        environment.set_fuel(Some(FUEL));
        dialect::install(&mut environment);
        let not_valid = |problem: String| Error::Unsupported(format!("the chat template is not valid: {problem}"));
        let translated = translate::translate(source).map_err(not_valid)?;
        let marks_answers = translated.marked.is_some();
        for (name, text) in [(PLAIN, Some(translated.plain)), (MARKED, translated.marked)] {
            let Some(text) = text else { continue };
            environment.add_template_owned(name, text).map_err(|e| not_valid(one_line(&e)))?;
        }
        let source = source.to_string();
        Ok(Self { source, marks_answers, environment, bos: bos.to_string(), eos: eos.to_string(), tokens: Map::new() })
    }

    /// The template with further special tokens by their names (`pad_token`, `unk_token`, …), as transformers gives them.
    pub fn with_tokens(mut self, tokens: Map<String, Value>) -> Self {
        self.tokens = tokens;
        self
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders messages (`[{"role": …, "content": …}, …]`, see [`crate::text::messages`]) to text. `tools` are passed on where the
    /// template knows them.
    pub fn render(&self, messages: &[Value], tools: Option<&Value>, add_generation_prompt: bool) -> Result<String> {
        self.render_with(messages, tools, &Map::new(), add_generation_prompt)
    }

    /// [`Self::render`] with further variables of the template: `chat_template_kwargs` of a request or of a row of data.
    ///
    /// # Errors
    /// Where a variable has the name of one that is given anyway ([`RESERVED`]), or the template refuses the conversation.
    pub fn render_with(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        variables: &Map<String, Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        self.render_form(PLAIN, messages, tools, variables, add_generation_prompt)
    }

    /// Whether the template says with `{% generation %}` what the assistant writes.
    pub fn marks_answers(&self) -> bool {
        self.marks_answers
    }

    /// [`Self::render_with`], without a generation prompt, and the byte ranges of what stands in `{% generation %}`: the
    /// assistant's tokens of transformers' `return_assistant_tokens_mask`.
    ///
    /// # Errors
    /// As [`Self::render_with`]; and where the text itself has the characters that mark the ranges.
    pub fn render_marked(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        variables: &Map<String, Value>,
    ) -> Result<(String, Vec<Range<usize>>)> {
        let plain = self.render_form(PLAIN, messages, tools, variables, false)?;
        if !self.marks_answers {
            return Ok((plain, Vec::new()));
        }
        let marked = self.render_form(MARKED, messages, tools, variables, false)?;
        let (mut text, mut ranges, mut open) = (String::with_capacity(plain.len()), Vec::new(), None);
        for c in marked.chars() {
            match (c, open) {
                (dialect::OPEN, None) => open = Some(text.len()),
                (dialect::CLOSE, Some(start)) => {
                    ranges.push(start..text.len());
                    open = None;
                }
                _ => text.push(c),
            }
        }
        if text != plain {
            return Err(Error::Unsupported(
                "the chat template's {% generation %} tags cannot be followed: they stand in one another, or what they hold is changed later".into(),
            ));
        }
        Ok((text, ranges))
    }

    fn render_form(
        &self,
        form: &str,
        messages: &[Value],
        tools: Option<&Value>,
        variables: &Map<String, Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        if let Some(name) = RESERVED.iter().find(|name| variables.contains_key(**name)) {
            return Err(Error::Unsupported(format!(
                "`{name}` cannot be among the chat template's own variables (chat_template_kwargs); it has a place of its own"
            )));
        }
        on_large_stack(|| self.compute(form, messages, tools, variables, add_generation_prompt))
    }

    fn compute(
        &self,
        form: &str,
        messages: &[Value],
        tools: Option<&Value>,
        variables: &Map<String, Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let failed =
            |e: JinjaError| Error::Unsupported(format!("the chat template refuses the conversation: {}", one_line(&e)));
        let template = self.environment.get_template(form).map_err(failed)?;
        let given = minijinja::context! {
            ..Jinja::from(Serde(variables)),
            ..Jinja::from(Serde(&self.tokens)),
            ..minijinja::context! {
                documents => Jinja::from(()),
                bos_token => self.bos.as_str(),
                eos_token => self.eos.as_str(),
            }
        };
        let render = |messages: &[Value]| {
            let context = minijinja::context! {
                messages => Jinja::from(Serde(messages)),
                tools => Jinja::from(Serde(tools)),
                add_generation_prompt => add_generation_prompt,
                // What stands later gives way to what stands earlier.
                ..given.clone()
            };
            template.render(context)
        };
        // transformers gives a template no `content` where there is none. Templates that join texts without a look need one.
        let without = |m: &Value| m.is_object() && m.get("content").is_none();
        let text = match render(messages) {
            Err(first) if messages.iter().any(without) => {
                let mut filled = messages.to_vec();
                filled.iter_mut().filter(|m| without(m)).for_each(|m| m["content"] = "".into());
                render(&filled).map_err(|_| failed(first))
            }
            other => other.map_err(failed),
        }?;
        if text.len() > MAX_TEXT {
            return Err(Error::Unsupported(format!(
                "the chat template makes {} bytes of the conversation, at most {MAX_TEXT} are read",
                text.len()
            )));
        }
        Ok(text)
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
    fn further_variables_reach_the_template() {
        let source = "{{ messages[0].content }}{{ '/think' if enable_thinking is not defined or enable_thinking }}{{ bos_token }}{{ documents }}";
        let template = ChatTemplate::new(source, "<s>", "").unwrap();
        let render = |variables: Value| {
            let messages = [json!({ "role": "user", "content": "q" })];
            template.render_with(&messages, None, variables.as_object().unwrap(), true)
        };
        assert_eq!(render(json!({})).unwrap(), "q/think<s>None");
        assert_eq!(render(json!({ "enable_thinking": true })).unwrap(), "q/think<s>None");
        let all = json!({ "enable_thinking": false, "bos_token": "B", "documents": "D", "unknown": 1 });
        assert_eq!(render(all).unwrap(), "qBD");
        for name in RESERVED {
            assert!(render(json!({ name: 1 })).unwrap_err().to_string().contains(&format!("`{name}`")));
        }
    }

    #[test]
    fn a_missing_content_is_missing_where_the_template_can_do_without_and_empty_elsewhere() {
        let call = json!({ "role": "assistant", "tool_calls": [] });
        let render =
            |source: &str| ChatTemplate::new(source, "", "").unwrap().render(std::slice::from_ref(&call), None, false);
        assert_eq!(render("{{ 'no' if messages[0].content is not defined else 'yes' }}").unwrap(), "no");
        assert_eq!(render("{{ 'a' + messages[0].content + 'b' }}").unwrap(), "ab");
        let error = render("{{ 'a' + messages[0].content + 3 }}").unwrap_err().to_string();
        assert!(error.starts_with("the chat template refuses"), "{error}");
    }

    #[test]
    fn an_endless_template_ends() {
        let source = "{% for a in range(90000) %}{% for b in range(90000) %}x{% endfor %}{% endfor %}";
        let error = ChatTemplate::new(source, "", "").unwrap().render(&[], None, false).unwrap_err();
        assert!(error.to_string().contains("fuel"), "{error}");
    }

    #[test]
    fn a_text_without_end_is_refused() {
        let source = "{% set a = 'x' * 30000000 %}{{ a }}{{ a }}";
        let error = ChatTemplate::new(source, "", "").unwrap().render(&[], None, false).unwrap_err();
        assert!(error.to_string().lines().count() == 1, "{error}");
    }

    #[test]
    fn raise_exception_carries_its_message() {
        let template = ChatTemplate::new("{{ raise_exception('roles must alternate') }}", "", "").unwrap();
        assert!(template.render(&[], None, false).unwrap_err().to_string().contains("roles must alternate"));
    }

    /// Templates that would overflow the stack, fill the memory or never end are refused.
    #[test]
    fn hostile_templates_are_refused() {
        let grow = |step: &str, times: usize, end: &str| {
            format!(
                "{{% set ns = namespace(x=['aaaa'], y=['aaaa']) %}}{{% for i in range({times}) %}}{step}{{% endfor %}}{end}"
            )
        };
        let twice = "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}";
        let deep = "{% set ns.x = [ns.x] %}";
        let chain = |piece: &str, times: usize| format!("{{{{ {}1 }}}}", piece.repeat(times));
        let sources = [
            grow(twice, 40, "{{ ns.x }}"),
            grow(twice, 40, "{{ ns.x ~ '' }}"),
            grow(twice, 40, "{{ ns.x == ns.y }}"),
            grow(twice, 40, "{{ ns.x | tojson }}"),
            grow(deep, 90_000, "{{ ns.x | length }}"),
            grow("{% set ns.x = {'a': (1, ns.x)} %}", 90_000, ""),
            grow("{% set ns.x = ns.x | batch(2) | list %}", 90_000, ""),
            grow("{% set ns.x = ns.x + ns.x %}", 60, "{{ ns.x | length }}"),
            grow("{% set ns.x = namespace(x=ns.x) %}", 90_000, ""),
            "{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns.x ~ '' }}".into(),
            "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns ~ '' }}".into(),
            "{% macro f(x, n) %}{{ f([x, x], n - 1) if n else x }}{% endmacro %}{{ f('a', 40) }}".into(),
            "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}".into(),
            chain("not ", 200_000),
            chain("1 + ", 200_000),
            chain("1 % ", 200_000),
            chain("[", 100_000),
            format!("{{% if 1 %}}{}{{% endif %}}", "{% elif 1 %}".repeat(80_000)),
            "{% if 1 %}".repeat(80_000),
            "{{ '%999999999d' % 5 }}".into(),
            "{{ '{:>999999999}'.format(5) }}".into(),
            "{{ 'a'.ljust(999999999) }}".into(),
            "{{ [1] | tojson(indent=999999999) }}".into(),
            "{{ 'a' | indent(999999999) }}".into(),
            "{ {{ {% {# '".repeat(20_000),
        ];
        for source in sources {
            let result = ChatTemplate::new(&source, "", "").and_then(|t| t.render(&[], None, false));
            assert!(result.is_err(), "{} gives {:?}", &source[..source.len().min(150)], result.map(|t| t.len()));
        }
        // What is bounded is as deep as it may be, on any thread's stack.
        for source in [chain("not ", 2_000), chain("1 + ", 1_000), grow(deep, 150, "{{ ns.x }}")] {
            ChatTemplate::new(&source, "", "").and_then(|t| t.render(&[], None, false)).unwrap();
        }
    }
}
