//! Where the answers stand in a conversation that a chat template has rendered.
//!
//! A template that has `{% generation %}` tags says it itself. Else the rendering of what comes before an answer, with the
//! generation prompt, is a prefix of the rendering with the answer, and the answer is what follows. Where it is no prefix
//! (templates that look at the first or at later messages, or count them), the answer is put in once more as a number that
//! occurs nowhere else, and found by it.

use std::ops::Range;

use lorimer_model::text::chat::ChatTemplate;
use serde_json::{Map, Value, json};

/// A rendered text and the byte ranges of answers in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub text: String,
    pub answers: Vec<Range<usize>>,
}

/// A conversation and all that its rendering depends on.
#[derive(Clone, Copy)]
pub(crate) struct Conversation<'a> {
    pub template: &'a ChatTemplate,
    pub messages: &'a [Value],
    pub tools: Option<&'a Value>,
    pub variables: &'a Map<String, Value>,
}

/// What stands before an answer with the generation prompt, and all through its end.
struct Around {
    prompt: String,
    through: String,
}

fn is_assistant(message: &Value) -> bool {
    message.get("role").and_then(Value::as_str) == Some("assistant")
}

/// Whether an answer is context only, as OpenAI's data says it.
fn is_context(message: &Value) -> bool {
    message.get("weight").and_then(Value::as_f64) == Some(0.0)
}

/// Bytes that two texts begin alike with, whole characters.
fn common(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum()
}

impl Conversation<'_> {
    /// The assistant's messages that are supervised, or those that are not.
    fn assistants(&self, context: bool) -> Vec<usize> {
        let of_kind = |&i: &usize| is_assistant(&self.messages[i]) && is_context(&self.messages[i]) == context;
        (0..self.messages.len()).filter(of_kind).collect()
    }

    /// Text of the last answer that is supervised.
    pub fn last_answer(&self) -> Option<String> {
        let last = self.assistants(false).pop()?;
        self.messages[last].get("content")?.as_str().map(|s| s.trim().to_string())
    }

    fn render(&self, messages: &[Value], prompt: bool) -> Result<String, String> {
        self.template.render_with(messages, self.tools, self.variables, prompt).map_err(|e| e.to_string())
    }

    /// The supervised answers. One part; or one for each answer, where the template writes an earlier answer differently once
    /// later messages follow (as templates do that drop earlier reasoning), each as the model gives it when it is asked.
    pub fn supervised(&self) -> Result<Vec<Part>, String> {
        let answers = self.assistants(false);
        if answers.is_empty() {
            return Err(match self.assistants(true).is_empty() {
                true => "has no assistant message to learn from".into(),
                false => "has only assistant messages of weight 0, which are not trained on".into(),
            });
        }
        if self.template.marks_answers() {
            return self.marked(&answers).map(|part| vec![part]);
        }
        let whole = self.render(self.messages, false)?;
        let around: Vec<Option<Around>> = answers.iter().map(|&i| self.around(i)).collect();
        let found = answers.iter().zip(&around).map(|(&i, around)| self.within(&whole, i, around.as_ref()));
        let found: Result<Vec<Range<usize>>, String> = found.collect();
        let same = |(around, place): (&Option<Around>, &Range<usize>)| {
            around.as_ref().is_none_or(|a| a.through[a.prompt.len()..] == whole[place.clone()])
        };
        if !found.as_ref().is_ok_and(|found| around.iter().zip(found).all(same))
            && let Some(around) = around.into_iter().collect::<Option<Vec<_>>>()
        {
            let part = |a: Around| {
                let answer = a.prompt.len()..a.through.len();
                Part { text: a.through, answers: vec![answer] }
            };
            return Ok(around.into_iter().map(part).collect());
        }
        Ok(vec![Part { answers: found?, text: whole }])
    }

    /// The whole conversation with the answers that are context only.
    pub fn context(&self) -> Result<Part, String> {
        let answers = self.assistants(true);
        if self.template.marks_answers() && !answers.is_empty() {
            return self.marked(&answers);
        }
        let whole = self.render(self.messages, false)?;
        let place = |&i: &usize| self.within(&whole, i, self.around(i).as_ref());
        let answers = answers.iter().map(place).collect::<Result<_, _>>()?;
        Ok(Part { text: whole, answers })
    }

    /// What the template marks with `{% generation %}`, for some of the answers.
    fn marked(&self, wanted: &[usize]) -> Result<Part, String> {
        let (text, marks) =
            self.template.render_marked(self.messages, self.tools, self.variables).map_err(|e| e.to_string())?;
        let all: Vec<usize> = (0..self.messages.len()).filter(|&i| is_assistant(&self.messages[i])).collect();
        if marks.is_empty() {
            return Err("has no answer that the chat template marks with {% generation %}".into());
        }
        if wanted.len() == all.len() {
            return Ok(Part { text, answers: marks });
        }
        if marks.len() != all.len() {
            return Err(format!(
                "has {} assistant messages, some with `weight` 0, and the chat template marks {} answers with {{% generation %}}: \
                 which are which cannot be told",
                all.len(),
                marks.len()
            ));
        }
        let answers = all.iter().zip(marks).filter(|(i, _)| wanted.contains(i)).map(|(_, mark)| mark).collect();
        Ok(Part { text, answers })
    }

    /// Renderings before and through an answer, where the first is a prefix of the second. What opens a conversation has
    /// nothing before it that a template could be asked for.
    fn around(&self, i: usize) -> Option<Around> {
        let prompt =
            self.messages.get(..i).filter(|before| !before.is_empty()).map(|before| self.render(before, true))?.ok()?;
        let through = self.render(&self.messages[..=i], false).ok()?;
        through.starts_with(&prompt).then_some(Around { prompt, through })
    }

    /// An answer's place in the whole conversation.
    fn within(&self, whole: &str, i: usize, around: Option<&Around>) -> Result<Range<usize>, String> {
        if let Some(around) = around.filter(|a| whole.starts_with(&a.through)) {
            return Ok(around.prompt.len()..around.through.len());
        }
        self.by_marker(whole, i).ok_or_else(|| {
            format!(
                "has an answer (message {}) whose place in what the chat template writes cannot be found; put the answer \
                 into {{% generation %}} … {{% endgeneration %}} in the template",
                i + 1
            )
        })
    }

    /// The place by a marker in the answer's stead.
    fn by_marker(&self, whole: &str, i: usize) -> Option<Range<usize>> {
        let mut number = 9_157_302_846_915_730_284_u64;
        while whole.contains(&number.to_string()) {
            number += 1;
        }
        let marker = number.to_string();
        // Text before and after the marker in the rendering of some messages, one of which has it as its content.
        let split = |messages: &[Value]| {
            let text = self.render(messages, false).ok()?;
            let (before, after) = text.split_once(&marker)?;
            (!after.contains(&marker)).then(|| (before.to_string(), after.to_string()))
        };
        let with_marker = |at: usize, until: usize| {
            let mut messages = self.messages[..until].to_vec();
            let fields = messages[at].as_object_mut()?;
            fields.retain(|key, _| {
                !matches!(key.as_str(), "tool_calls" | "function_call" | "reasoning_content" | "thinking" | "reasoning")
            });
            fields.insert("content".into(), json!(marker));
            Some(messages)
        };
        let (before, after) = split(&with_marker(i, self.messages.len())?)?;
        // The answer begins after its header, which is what a generation prompt adds.
        let asked = self.render(self.messages, true).ok();
        let header = asked.as_deref().and_then(|text| text.strip_prefix(whole)).unwrap_or_default();
        let from = match i.checked_sub(1) {
            Some(previous) => split(&with_marker(previous, self.messages.len())?).map_or(0, |(before, _)| before.len()),
            None => 0,
        };
        let start = match before.get(from..)?.rfind(header) {
            Some(at) if !header.is_empty() => from + at + header.len(),
            _ => before.len(),
        };
        // It ends with what also ends a conversation of which it is the last message.
        let (_, closing) = split(&with_marker(i, i + 1)?)?;
        let rest = &after[common(&closing, &after)..];
        let end = whole.len().checked_sub(rest.len())?;
        (whole.starts_with(&before[..start]) && whole.ends_with(rest) && start <= end).then_some(start..end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(template: &str, messages: &[Value]) -> Result<Vec<Part>, String> {
        let template = ChatTemplate::new(template, "<s>", "</s>").unwrap();
        Conversation { template: &template, messages, tools: None, variables: &Map::new() }.supervised()
    }

    /// transformers' assistant masks (tests/goldens/make_answers.py), with the template's tags and without them.
    #[test]
    fn answers_stand_where_transformers_says() {
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/goldens/answers.json");
        let golden: Value = serde_json::from_str(&std::fs::read_to_string(golden).unwrap()).unwrap();
        let mut wrong = Vec::new();
        for case in golden["table"].as_array().unwrap() {
            let (kind, name) = (case["template"].as_str().unwrap(), case["conversation"].as_str().unwrap());
            let tagged = golden["templates"][kind].as_str().unwrap();
            let bare = ["{% generation %}", "{% endgeneration %}", "{%- generation %}", "{%- endgeneration %}"];
            let bare = bare.iter().fold(tagged.to_string(), |t, tag| t.replace(tag, ""));
            assert!(!bare.contains("generation %}"), "{bare}");
            let messages = golden["conversations"][name].as_array().unwrap();
            let ranges = case["answers"].as_array().unwrap().iter();
            let ranges = ranges.map(|r| r[0].as_u64().unwrap() as usize..r[1].as_u64().unwrap() as usize).collect();
            let expected = Part { text: case["text"].as_str().unwrap().into(), answers: ranges };
            for (what, template) in [("with tags", tagged), ("without", &bare)] {
                let found = places(template, messages);
                if found.as_ref() != Ok(&vec![expected.clone()]) {
                    wrong.push(format!("{kind}, {name}, {what}: {found:?} instead of {expected:?}"));
                }
            }
        }
        assert!(wrong.is_empty(), "{} of them\n{}", wrong.len(), wrong.join("\n"));
    }

    /// A template that drops the reasoning of earlier answers: each is supervised as it was given.
    #[test]
    fn answers_that_change_later_are_supervised_as_they_were_given() {
        let template = "{% for m in messages %}{% if m.role == 'assistant' %}A:{% if loop.last %}{{ m.content }}{% else %}\
                        {{ m.content.split('</think>')[-1] }}{% endif %}.{% else %}U:{{ m.content }}.{% endif %}{% endfor %}\
                        {% if add_generation_prompt %}A:{% endif %}";
        let [u, a] = ["user", "assistant"].map(|role| move |content: &str| json!({ "role": role, "content": content }));
        let messages = [u("p"), a("x</think>one"), u("q"), a("y</think>two")];
        let parts = places(template, &messages).unwrap();
        let supervised: Vec<_> = parts.iter().map(|p| (p.text.as_str(), &p.text[p.answers[0].clone()])).collect();
        assert_eq!(
            supervised,
            [("U:p.A:x</think>one.", "x</think>one."), ("U:p.A:one.U:q.A:y</think>two.", "y</think>two.")]
        );
    }

    #[test]
    fn calls_and_reasoning_belong_to_the_answer() {
        let call = json!([{ "function": { "name": "tide", "arguments": { "port": "Brest" } } }]);
        let messages = [
            json!({ "role": "assistant", "reasoning_content": "hm", "content": "hello", "tool_calls": call }),
            json!({ "role": "tool", "content": "4.1" }),
            json!({ "role": "assistant", "content": "4.1 m" }),
        ];
        let template = "{{ messages | length }}{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}\
                        {{ m.content }}{% for c in m.tool_calls or [] %}({{ c.function | tojson }}){% endfor %}</>{% endfor %}\
                        {% if add_generation_prompt %}<assistant>{% endif %}";
        let parts = places(template, &messages).unwrap();
        let supervised: Vec<&str> = parts[0].answers.iter().map(|a| &parts[0].text[a.clone()]).collect();
        assert_eq!(
            (parts.len(), supervised),
            (1, vec![r#"[hm]hello({"name": "tide", "arguments": {"port": "Brest"}})</>"#, "4.1 m</>"])
        );
    }

    #[test]
    fn answers_of_weight_0_are_context() {
        let plain = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
        let tagged =
            "{% for m in messages %}<{{ m.role }}>{% generation %}{{ m.content }}</>{% endgeneration %}{% endfor %}";
        let only = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</>{% endgeneration %}{% endif %}{% endfor %}";
        let messages = [
            json!({ "role": "user", "content": "q" }),
            json!({ "role": "assistant", "content": "one", "weight": 0 }),
            json!({ "role": "assistant", "content": "two", "weight": 1 }),
        ];
        for template in [plain, only] {
            let parts = places(template, &messages).unwrap();
            let supervised: Vec<&str> = parts[0].answers.iter().map(|a| &parts[0].text[a.clone()]).collect();
            assert_eq!((parts.len(), supervised), (1, vec!["two</>"]), "{template}");
        }
        assert!(places(tagged, &messages).unwrap_err().contains("which are which cannot be told"));
        assert!(places(plain, &messages[..2]).unwrap_err().contains("only assistant messages of weight 0"));
        assert!(places(plain, &messages[..1]).unwrap_err().contains("has no assistant message"));
    }

    #[test]
    fn what_cannot_be_found_is_refused() {
        // The answer is written twice.
        let template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}";
        let messages = [json!({ "role": "user", "content": "q" }), json!({ "role": "assistant", "content": "a" })];
        let problem = places(template, &messages).unwrap_err();
        assert!(problem.contains("message 2") && problem.contains("{% generation %}"), "{problem}");
        let nothing = "{% for m in messages %}{{ m.content }}{% endfor %}{% if false %}{% generation %}{% endgeneration %}{% endif %}";
        assert!(places(nothing, &messages).unwrap_err().contains("has no answer that the chat template marks"));
    }
}
