//! A grammar over lexemes in Lark.

use std::fmt::Write;

use super::lexemes::{Tree, cut};
use super::parse::{Letters, Node, parse};

/// Most bytes of the grammar that is made.
const LONGEST: usize = 256 << 10;

/// The same grammar in llguidance's dialect of Lark.
///
/// # Errors
///
/// Fails if the text is no grammar, uses what is not offered, or would become too long.
pub fn to_lark(text: &str) -> Result<String, String> {
    let rules = parse(text)?;
    let lexed = cut(&rules);
    let mut out = String::from("start: r0\n");
    for (number, rule) in lexed.rules.iter().enumerate() {
        let Some(rule) = rule else { continue };
        let _ = writeln!(out, "r{number}: {}", rule_text(rule, &lexed.lexemes));
    }
    let mut used = Vec::new();
    for (number, (node, nullable)) in lexed.lexemes.iter().enumerate() {
        let text = terminal(node, &mut used);
        // Where it is empty it is left out.
        let _ = match nullable {
            true => writeln!(out, "T{number}: ({text}) & /(?s:.+)/"),
            false => writeln!(out, "T{number}: {text}"),
        };
        too_long(&out)?;
    }
    let mut written = vec![false; rules.len()];
    while let Some(number) = used.pop() {
        if !std::mem::replace(&mut written[number], true) {
            let text = terminal(&rules[number], &mut used);
            let _ = writeln!(out, "R{number}: {text}");
            too_long(&out)?;
        }
    }
    Ok(out)
}

fn too_long(out: &str) -> Result<(), String> {
    match out.len() > LONGEST {
        true => Err(format!("the grammar becomes longer than {LONGEST} bytes")),
        false => Ok(()),
    }
}

fn times(least: u32, most: Option<u32>) -> String {
    match (least, most) {
        (0, None) => "*".into(),
        (1, None) => "+".into(),
        (0, Some(1)) => "?".into(),
        (least, None) => format!("{{{least},}}"),
        (least, Some(most)) => format!("{{{least},{most}}}"),
    }
}

fn rule_text(tree: &Tree, lexemes: &[(Node, bool)]) -> String {
    let each =
        |all: &[Tree], between: &str| all.iter().map(|tree| rule_text(tree, lexemes)).collect::<Vec<_>>().join(between);
    match tree {
        Tree::Lexeme(number) if lexemes[*number].1 => format!("T{number}?"),
        Tree::Lexeme(number) => format!("T{number}"),
        Tree::Rule(number) => format!("r{number}"),
        Tree::Sequence(all) if all.is_empty() => "\"\"".into(),
        Tree::Sequence(all) => format!("({})", each(all, " ")),
        Tree::Choice(all) => format!("({})", each(all, " | ")),
        Tree::Repeat(inner, least, most) => format!("({}){}", rule_text(inner, lexemes), times(*least, *most)),
    }
}

/// Letters as a class of a regular expression, or as themselves.
fn class(letters: &Letters) -> String {
    let one = |code: u32| match char::from_u32(code) {
        Some(letter) if letter.is_ascii_alphanumeric() => letter.to_string(),
        _ => format!("\\u{{{code:x}}}"),
    };
    match letters[..] {
        [(from, to)] if from == to => one(from),
        _ => {
            let ranges =
                letters.iter().map(|&(from, to)| if from == to { one(from) } else { one(from) + "-" + &one(to) });
            format!("[{}]", ranges.collect::<String>())
        }
    }
}

/// What is regular as a terminal; rules that it uses are added to `used`.
fn terminal(node: &Node, used: &mut Vec<usize>) -> String {
    match node {
        Node::Letter(letters) => format!("/{}/", class(letters)),
        Node::Rule(number) => {
            used.push(*number);
            format!("R{number}")
        }
        Node::Sequence(all) if all.is_empty() => "\"\"".into(),
        Node::Sequence(all) => {
            let mut parts: Vec<String> = Vec::new();
            let mut letters = String::new();
            for node in all {
                match node {
                    Node::Letter(one) => letters += &class(one),
                    _ => {
                        if !letters.is_empty() {
                            parts.push(format!("/{}/", std::mem::take(&mut letters)));
                        }
                        parts.push(terminal(node, used));
                    }
                }
            }
            if !letters.is_empty() {
                parts.push(format!("/{letters}/"));
            }
            format!("({})", parts.join(" "))
        }
        Node::Choice(all) => {
            format!("({})", all.iter().map(|node| terminal(node, used)).collect::<Vec<_>>().join(" | "))
        }
        Node::Repeat(_, _, Some(0)) => "\"\"".into(),
        Node::Repeat(inner, least, most) => format!("({}){}", terminal(inner, used), times(*least, *most)),
    }
}
