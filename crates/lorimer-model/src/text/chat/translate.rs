//! What minijinja does not read in a template, written so that it does.
//!
//! - `{% generation %}` … `{% endgeneration %}` (transformers' tags around what the assistant says): a scope of its own, or a
//!   filter block that marks where it stands in the output.
//! - `a % b`, which in Python also fills a text's `%s`: a call of the function [`REMAINDER`].
//! - Texts with Python's escapes: with those that minijinja knows.
//! - `{% set a = b %}`: what is assigned goes through the function [`BOUNDED`], since values that hold values, built in a loop,
//!   are how a template could overflow the stack or fill the memory.
//! - Line ends: jinja2 knows one, and keeps the one after `{% raw %}`.

/// The filter that marks what stands in `{% generation %}`.
pub(super) const MARK: &str = "__generation";
/// The function that `%` becomes.
pub(super) const REMAINDER: &str = "__remainder";

/// The function that what is assigned to a variable goes through.
pub(super) const BOUNDED: &str = "__bounded";
/// The same for an attribute of a namespace.
pub(super) const BOUNDED_ATTRIBUTE: &str = "__bounded_attribute";

/// Most tokens of a tag. Parsers go down a level for each of some of them, so that a tag of many would overflow the stack.
const MAX_TOKENS: usize = 2048;
/// Most `elif`s of a template, for the same reason.
const MAX_ELIFS: usize = 1000;

/// A template as minijinja reads it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Translated {
    /// What is rendered.
    pub plain: String,
    /// The same with marks around what stands in `{% generation %}`, where there is such a tag.
    pub marked: Option<String>,
}

/// Translates a template. What is not well formed is left as it is, for the parser to refuse.
///
/// # Errors
/// Where a tag is too long or there are too many branches.
pub(super) fn translate(source: &str) -> Result<Translated, String> {
    let (mut plain, mut marked, mut tags) = (String::with_capacity(source.len()), String::new(), false);
    let mut push = |both: [&str; 2]| {
        plain.push_str(both[0]);
        marked.push_str(both[1]);
    };
    let mut elifs = 0;
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut rest = source.as_str();
    while let Some(at) = rest.find("{") {
        let tag = &rest[at..];
        let (end, raw) = match tag.as_bytes().get(1) {
            Some(b'#') => (tag.find("#}").map(|end| end + 2), 0),
            Some(b'{') => (tag_end(tag, "}}"), 0),
            Some(b'%') => {
                let end = tag_end(tag, "%}");
                (end, end.map_or(0, |end| raw_length(&tag[..end], &tag[end..])))
            }
            _ => (Some(1), 0),
        };
        let Some(length) = end.map(|end| end + raw) else { break };
        let (text, tag) = (&rest[..at], &tag[..length]);
        rest = &rest[at + length..];
        push([text; 2]);
        if raw > 0 {
            let (open, content) = tag.split_at(length - raw);
            push([open; 2]);
            if content.starts_with('\n') && !open.ends_with("-%}") {
                push(["\n"; 2]);
            }
            push([content; 2]);
            continue;
        }
        if tag.starts_with("{#") {
            push([tag; 2]);
            continue;
        }
        match generation(tag) {
            Some((before, name, after)) => {
                tags = true;
                let (scope, filter) = if name == "generation" {
                    ("with", format!("filter {MARK}"))
                } else {
                    ("endwith", "endfilter".into())
                };
                push([&format!("{before} {scope} {after}"), &format!("{before} {filter} {after}")]);
            }
            None => {
                elifs += usize::from(tag.trim_start_matches(['{', '%', '-', '+', ' ', '\n']).starts_with("elif"));
                if elifs > MAX_ELIFS {
                    return Err(format!("it has more than {MAX_ELIFS} `elif`s"));
                }
                push([&expressions(tag)?; 2]);
            }
        }
    }
    push([rest; 2]);
    Ok(Translated { plain, marked: tags.then_some(marked) })
}

/// The parts of a `{% generation %}` or `{% endgeneration %}` tag: its opening, name and end.
fn generation(tag: &str) -> Option<(&str, &str, &str)> {
    let inner = tag.strip_prefix("{%")?.strip_suffix("%}")?;
    let (open, inner) = inner.split_at(usize::from(inner.starts_with(['-', '+'])));
    let (inner, close) = inner.split_at(inner.len() - usize::from(inner.ends_with(['-', '+'])));
    let name = inner.trim();
    matches!(name, "generation" | "endgeneration")
        .then(|| (&tag[..2 + open.len()], name, &tag[tag.len() - 2 - close.len()..]))
}

/// Where `{% raw %}` stands: the length of what follows through `{% endraw %}`.
fn raw_length(tag: &str, following: &str) -> usize {
    let name = |tag: &str| tag.trim_matches(['{', '}', '%', '-', '+']).trim().to_string();
    if name(tag) != "raw" {
        return 0;
    }
    let mut from = 0;
    while let Some(at) = following[from..].find("{%") {
        let start = from + at;
        let Some(end) = following[start..].find("%}") else { break };
        if name(&following[start..start + end + 2]) == "endraw" {
            return start + end + 2;
        }
        from = start + 2;
    }
    following.len()
}

/// Length of a tag through its end, which may also stand in a text of it or, for `}}`, close two of its own brackets.
fn tag_end(tag: &str, end: &str) -> Option<usize> {
    let bytes = tag.as_bytes();
    let (mut at, mut depth) = (2, 0_usize);
    while at < bytes.len() {
        if depth == 0 && tag[at..].starts_with(end) {
            return Some(at + 2);
        }
        match bytes[at] {
            quote @ (b'\'' | b'"') => at = text_end(bytes, at, quote)?,
            b'{' | b'[' | b'(' => (at, depth) = (at + 1, depth + 1),
            b'}' | b']' | b')' => (at, depth) = (at + 1, depth.saturating_sub(1)),
            _ => at += tag[at..].chars().next().map_or(1, char::len_utf8),
        }
    }
    None
}

/// Where a text that begins with a quote ends.
fn text_end(bytes: &[u8], start: usize, quote: u8) -> Option<usize> {
    let mut at = start + 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            b if b == quote => return Some(at + 1),
            _ => at += 1,
        }
    }
    None
}

/// A token of a tag with the blanks before it.
#[derive(Clone, Debug)]
struct Token {
    blanks: String,
    text: String,
}

impl Token {
    fn new(text: &str) -> Self {
        Self { blanks: String::new(), text: text.into() }
    }
}

fn tokens(code: &str) -> Vec<Token> {
    let bytes = code.as_bytes();
    let (mut at, mut list) = (0, Vec::new());
    while at < code.len() {
        let blanks_at = at;
        at += code[at..].len() - code[at..].trim_start().len();
        let start = at;
        let word = |c: char| c.is_alphanumeric() || c == '_';
        match code[at..].chars().next() {
            None => {}
            Some(quote @ ('\'' | '"')) => at = text_end(bytes, at, quote as u8).unwrap_or(code.len()).min(code.len()),
            Some(c) if word(c) => {
                // A number's point belongs to it; an attribute's does not matter here.
                at += code[at..].find(|c| !word(c)).unwrap_or(code.len() - at);
            }
            Some(c) => {
                let two = ["**", "//", "==", "!=", "<=", ">="].iter().any(|op| code[at..].starts_with(op));
                at += if two { 2 } else { c.len_utf8() };
            }
        }
        // Blanks at the end make a token of their own.
        let (blanks, text) = if start < at { (blanks_at..start, start..at) } else { (at..at, blanks_at..at) };
        list.push(Token { blanks: code[blanks].into(), text: code[text].into() });
    }
    list
}

/// Whether an operand cannot go on over this token: it binds weaker than `%`.
fn weaker(token: &str) -> bool {
    matches!(
        token,
        "+" | "-"
            | "~"
            | "=="
            | "!="
            | "<"
            | ">"
            | "<="
            | ">="
            | ","
            | ":"
            | "="
            | "and"
            | "or"
            | "not"
            | "in"
            | "is"
            | "if"
            | "else"
    )
}

/// Whether what follows this token begins an operand, so that a sign there is one of a number.
fn operator(token: &str) -> bool {
    weaker(token) || matches!(token, "*" | "/" | "//" | "%" | "**" | "(" | "[" | "{" | "|")
}

/// A text as Python reads it, written for minijinja; None where both read it alike.
fn python_text(literal: &str) -> Option<String> {
    let inner = literal.get(1..literal.len() - 1)?;
    let mut out = String::new();
    let mut chars = inner.chars();
    let mut other = false;
    let hexadecimal = |chars: &mut std::str::Chars, digits: usize| {
        let text = chars.as_str().get(..digits).filter(|t| t.bytes().all(|b| b.is_ascii_hexdigit()))?;
        let c = char::from_u32(u32::from_str_radix(text, 16).ok()?)?;
        *chars = chars.as_str()[digits..].chars();
        Some(c)
    };
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        let (before, escape) = (chars.clone(), chars.next()?);
        let read = match escape {
            '\\' | '\'' | '"' | 'b' | 'f' | 'n' | 'r' | 't' | 'u' | 'x' => {
                out.extend(['\\', escape]);
                continue;
            }
            '\n' => {
                other = true;
                continue;
            }
            'a' => Some('\u{7}'),
            'v' => Some('\u{b}'),
            'U' => hexadecimal(&mut chars, 8),
            '0'..='7' => {
                let digits = before.as_str().bytes().take(3).take_while(|b| matches!(b, b'0'..=b'7')).count();
                let (digits, rest) = before.as_str().split_at(digits);
                chars = rest.chars();
                u32::from_str_radix(digits, 8).ok().and_then(char::from_u32)
            }
            _ => None,
        };
        other = true;
        match read {
            Some(c) => out.push(c),
            // What is no escape is the two characters.
            None => out.extend(['\\', '\\', escape]),
        }
    }
    other.then(|| format!("{}{out}{}", &literal[..1], &literal[..1]))
}

/// A tag with its texts, remainders and assignments written for minijinja.
fn expressions(tag: &str) -> Result<String, String> {
    let Some(inner) = tag.get(2..tag.len().saturating_sub(2)) else { return Ok(tag.to_string()) };
    let (start, end) = (&tag[..2], &tag[tag.len() - 2..]);
    let (open, inner) = inner.split_at(usize::from(inner.starts_with(['-', '+'])));
    let (inner, close) = inner.split_at(inner.len() - usize::from(inner.ends_with(['-', '+'])));
    let mut list = tokens(inner);
    if list.len() > MAX_TOKENS {
        return Err(format!("a tag of it has more than {MAX_TOKENS} words and signs"));
    }
    for token in list.iter_mut().filter(|t| t.text.starts_with(['\'', '"']) && t.text.contains('\\')) {
        if let Some(text) = python_text(&token.text) {
            token.text = text;
        }
    }
    // In a block tag the first word says what it does.
    let first = usize::from(start == "{%");
    while let Some(at) = list.iter().position(|t| t.text == "%") {
        let (Some(left), Some(right)) = (operand_start(&list, first, at), operand_end(&list, at)) else { break };
        list[at].text = ",".into();
        list.insert(right, Token::new(")"));
        let blanks = std::mem::take(&mut list[left].blanks);
        list.insert(left, Token::new("("));
        list.insert(left, Token { blanks, text: REMAINDER.into() });
    }
    if first == 1 && list.first().is_some_and(|t| t.text == "set") {
        bound(&mut list);
    }
    let code: String = list.iter().flat_map(|t| [t.blanks.as_str(), t.text.as_str()]).collect();
    Ok(format!("{start}{open}{code}{close}{end}"))
}

/// Puts a call around what a `set` assigns, of which several with commas between are a tuple.
fn bound(list: &mut Vec<Token>) {
    let Some(from) = list.iter().position(|t| t.text == "=").map(|at| at + 1) else { return };
    let to = list.len() - usize::from(list[list.len() - 1].text.trim().is_empty());
    if from >= to {
        return;
    }
    let (mut depth, mut tuple) = (0_usize, false);
    for token in &list[from..to] {
        match token.text.as_str() {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth = depth.saturating_sub(1),
            "," if depth == 0 => tuple = true,
            _ => {}
        }
    }
    let of_attribute = list[..from].iter().any(|t| t.text == ".");
    let pairs = 1 + usize::from(tuple);
    list.insert(to, Token::new(&")".repeat(pairs)));
    let blanks = std::mem::take(&mut list[from].blanks);
    list.insert(from, Token::new(&"(".repeat(pairs)));
    let text = if of_attribute { BOUNDED_ATTRIBUTE } else { BOUNDED }.into();
    list.insert(from, Token { blanks, text });
}

/// The first token of the operand before an operator.
fn operand_start(list: &[Token], first: usize, operator_at: usize) -> Option<usize> {
    let (mut at, mut depth) = (operator_at, 0_usize);
    while at > first {
        let text = list[at - 1].text.as_str();
        match text {
            ")" | "]" | "}" => depth += 1,
            "(" | "[" | "{" if depth == 0 => break,
            "(" | "[" | "{" => depth -= 1,
            // A sign that begins an operand belongs to it.
            "+" | "-" if depth == 0 && (at - 1 == first || operator(&list[at - 2].text)) => {}
            _ if depth == 0 && weaker(text) => break,
            _ => {}
        }
        at -= 1;
    }
    (at < operator_at && depth == 0).then_some(at)
}

/// One past the last token of the operand after an operator.
fn operand_end(list: &[Token], operator_at: usize) -> Option<usize> {
    let (mut at, mut depth) = (operator_at + 1, 0_usize);
    while at < list.len() && !list[at].text.trim().is_empty() {
        let text = list[at].text.as_str();
        match text {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" if depth == 0 => break,
            ")" | "]" | "}" => depth -= 1,
            "+" | "-" if depth == 0 && operator(&list[at - 1].text) => {}
            _ if depth == 0 && (weaker(text) || matches!(text, "*" | "/" | "//" | "%")) => break,
            _ => {}
        }
        at += 1;
    }
    (at > operator_at + 1 && depth == 0).then_some(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_remainder_is_a_call_with_its_operands() {
        for (given, expected) in [
            ("{{ 7 % 3 }}", "{{ __remainder(7 , 3) }}"),
            ("{{ a.b[1] % (1, 2) ~ 'c' }}", "{{ __remainder(a.b[1] , (1, 2)) ~ 'c' }}"),
            ("{{ 1 + 2 * 7 % 4 * 3 }}", "{{ 1 + __remainder(2 * 7 , 4) * 3 }}"),
            ("{{ 7 % 4 % 2 }}", "{{ __remainder(__remainder(7 , 4) , 2) }}"),
            ("{{ 1 - -7 % -4 }}", "{{ 1 - __remainder(-7 , -4) }}"),
            ("{{ x | length % 2 == 0 }}", "{{ __remainder(x | length , 2) == 0 }}"),
            ("{{ f(a % b, [c % d]) }}", "{{ f(__remainder(a , b), [__remainder(c , d)]) }}"),
            (
                "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}",
                "{%- if (m.role == 'user') != (__remainder(loop.index0 , 2) == 0) -%}",
            ),
            (
                "{% set x = '%s' % 'a' if b else 'c' %}",
                "{% set x = __bounded(__remainder('%s' , 'a') if b else 'c') %}",
            ),
            ("{%- set a, b=1, (2, 3) -%}", "{%- set a, b=__bounded((1, (2, 3))) -%}"),
            ("{% set ns.x = f(a=1) %}", "{% set ns.x = __bounded_attribute(f(a=1)) %}"),
            ("{% set x %}", "{% set x %}"),
            ("{% set x = %}", "{% set x = %}"),
            ("{% elif i % 2 %}", "{% elif __remainder(i , 2) %}"),
        ] {
            assert_eq!(translate(given), Ok(Translated { plain: expected.into(), marked: None }));
        }
    }

    #[test]
    fn texts_comments_and_raw_parts_are_left() {
        for same in [
            "100 % sure {",
            "{{ '7 % 3' }}",
            "{# 7 % 3 {% generation %} #}",
            "{% raw %}{{ 7 % 3 }}{% generation %}{% endraw %}",
            "{{ '{% generation %}' }}",
            "{{ 7 %",
            "{% if",
            "{% raw %}{{ 7 % 3 }}",
            "{{ % }}",
            "{{ 7 % }}",
            "{{ ) % ( }}",
            "{{ 'a",
        ] {
            assert_eq!(translate(same), Ok(Translated { plain: same.into(), marked: None }));
        }
    }

    #[test]
    fn generation_is_a_scope_or_a_mark() {
        let given = "a{%- generation -%}\n{{ 1 % 2 }}{% endgeneration %}b";
        let expected = Translated {
            plain: "a{%- with -%}\n{{ __remainder(1 , 2) }}{% endwith %}b".into(),
            marked: Some("a{%- filter __generation -%}\n{{ __remainder(1 , 2) }}{% endfilter %}b".into()),
        };
        assert_eq!(translate(given), Ok(expected));
        assert!(translate("{%generation%}{%+ endgeneration +%}").unwrap().marked.is_some());
    }
}
