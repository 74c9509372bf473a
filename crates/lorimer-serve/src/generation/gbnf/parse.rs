//! The text of a grammar to its rules.

use std::collections::HashMap;

/// Most times that something is repeated, as in llama.cpp.
pub const MOST_TIMES: u32 = 2000;
/// The last code point.
pub const LAST: u32 = 0x10ffff;

/// Letters: ranges of code points, in order and apart from each other.
pub type Letters = Vec<(u32, u32)>;

/// What a rule gives.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Node {
    /// One of some letters.
    Letter(Letters),
    /// What another rule gives.
    Rule(usize),
    /// One after the other; none of them for nothing.
    Sequence(Vec<Node>),
    /// One of them.
    Choice(Vec<Node>),
    /// So many times at least, and at most, if there is a bound.
    Repeat(Box<Node>, u32, Option<u32>),
}

/// Ranges in order, those that touch made one, surrogates left out.
fn ordered(mut ranges: Letters) -> Letters {
    ranges.sort_unstable();
    let mut all: Letters = Vec::new();
    for (from, to) in ranges {
        match all.last_mut() {
            Some((_, last)) if from <= last.saturating_add(1) => *last = to.max(*last),
            _ => all.push((from, to)),
        }
    }
    let cut =
        |(from, to): (u32, u32)| [(from, to.min(0xd7ff)), (from.max(0xe000), to)].into_iter().filter(|(a, b)| a <= b);
    all.into_iter().flat_map(cut).collect()
}

/// All other letters.
fn others(ranges: &Letters) -> Letters {
    let (mut all, mut next) = (Letters::new(), 0);
    for &(from, to) in ranges {
        if from > next {
            all.push((next, from - 1));
        }
        next = to + 1;
    }
    all.push((next, LAST));
    all.retain(|(from, to)| from <= to);
    ordered(all)
}

/// Rules by number; `root` has number 0.
pub fn parse(text: &str) -> Result<Vec<Node>, String> {
    let letters: Vec<char> = text.chars().collect();
    let mut reader = Reader {
        letters: &letters,
        at: 0,
        names: HashMap::from([("root".to_string(), 0)]),
        order: vec!["root".into()],
    };
    let mut rules: Vec<Option<Node>> = Vec::new();
    reader.space(true);
    while reader.at < letters.len() {
        let (number, node) = reader.rule()?;
        rules.resize(reader.names.len(), None);
        if rules[number].replace(node).is_some() {
            return Err(format!("the rule `{}` is given twice", reader.order[number]));
        }
        reader.space(true);
    }
    rules.resize(reader.names.len(), None);
    let given = rules.into_iter().enumerate();
    given.map(|(i, rule)| rule.ok_or_else(|| format!("there is no rule `{}`", reader.order[i]))).collect()
}

struct Reader<'a> {
    letters: &'a [char],
    at: usize,
    names: HashMap<String, usize>,
    /// Names by number.
    order: Vec<String>,
}

impl Reader<'_> {
    fn peek(&self) -> Option<char> {
        self.letters.get(self.at).copied()
    }

    /// Passes a letter that is wanted.
    fn take(&mut self, wanted: char) -> bool {
        let there = self.peek() == Some(wanted);
        self.at += usize::from(there);
        there
    }

    /// What is wrong, and where.
    fn wrong<T>(&self, what: &str) -> Result<T, String> {
        let line = 1 + self.letters[..self.at.min(self.letters.len())].iter().filter(|c| **c == '\n').count();
        Err(format!("line {line} of the grammar: {what}"))
    }

    /// Passes spaces and comments; line ends where a rule may go on after them.
    fn space(&mut self, lines: bool) {
        while let Some(letter) = self.peek() {
            match letter {
                ' ' | '\t' => self.at += 1,
                '\r' | '\n' if lines => self.at += 1,
                '#' => {
                    while self.peek().is_some_and(|c| c != '\n' && c != '\r') {
                        self.at += 1;
                    }
                }
                _ => return,
            }
        }
    }

    fn name(&mut self) -> Result<usize, String> {
        let begun = self.at;
        while self.peek().is_some_and(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_') {
            self.at += 1;
        }
        let name: String = self.letters[begun..self.at].iter().collect();
        if name.is_empty() {
            return match self.peek() {
                Some('<' | '!') => self.wrong("tokens (`<…>`) are not offered; write their text"),
                Some(letter) => self.wrong(&format!("`{}` is not expected", letter.escape_debug())),
                None => self.wrong("its end is not expected"),
            };
        }
        let next = self.names.len();
        if let Some(&number) = self.names.get(&name) {
            return Ok(number);
        }
        self.order.push(name.clone());
        self.names.insert(name, next);
        Ok(next)
    }

    fn rule(&mut self) -> Result<(usize, Node), String> {
        let number = self.name()?;
        self.space(false);
        if !(self.take(':') && self.take(':') && self.take('=')) {
            return self.wrong("`::=` is expected after the name of a rule");
        }
        self.space(true);
        let node = self.choice(false)?;
        match self.peek() {
            None | Some('\r' | '\n') => Ok((number, node)),
            Some(_) => self.name().and_then(|_| self.wrong("a rule ends at the end of its line")),
        }
    }

    fn choice(&mut self, nested: bool) -> Result<Node, String> {
        let mut all = vec![self.sequence(nested)?];
        while self.take('|') {
            self.space(true);
            all.push(self.sequence(nested)?);
        }
        Ok(if all.len() == 1 { all.remove(0) } else { Node::Choice(all) })
    }

    fn sequence(&mut self, nested: bool) -> Result<Node, String> {
        let mut all = Vec::new();
        while let Some(letter) = self.peek() {
            let node = match letter {
                '|' | ')' | '\r' | '\n' => break,
                '"' => self.literal()?,
                '[' => self.class()?,
                '.' => {
                    self.at += 1;
                    Node::Letter(others(&Letters::new()))
                }
                '(' => {
                    self.at += 1;
                    self.space(true);
                    let inner = self.choice(true)?;
                    if !self.take(')') {
                        return self.wrong("a `)` is missing");
                    }
                    inner
                }
                _ => Node::Rule(self.name()?),
            };
            self.space(nested);
            let node = self.repeated(node)?;
            all.push(node);
            self.space(nested);
        }
        Ok(if all.len() == 1 { all.remove(0) } else { Node::Sequence(all) })
    }

    fn repeated(&mut self, node: Node) -> Result<Node, String> {
        let (least, most) = match self.peek() {
            Some('*') => (0, None),
            Some('+') => (1, None),
            Some('?') => (0, Some(1)),
            Some('{') => {
                self.at += 1;
                self.space(true);
                let least = if self.peek() == Some(',') { 0 } else { self.number()? };
                self.space(true);
                let mut most = Some(least);
                if self.take(',') {
                    self.space(true);
                    most = if self.peek() == Some('}') { None } else { Some(self.number()?) };
                    self.space(true);
                }
                if self.peek() != Some('}') {
                    return self.wrong("a `}` is missing");
                }
                if most.is_some_and(|most| most < least) {
                    return self.wrong("a repetition has its larger number first");
                }
                (least, most)
            }
            _ => return Ok(node),
        };
        self.at += 1;
        Ok(Node::Repeat(Box::new(node), least, most))
    }

    fn number(&mut self) -> Result<u32, String> {
        let mut number = None;
        while let Some(digit) = self.peek().and_then(|c| c.to_digit(10)) {
            self.at += 1;
            number = Some(number.unwrap_or(0) * 10 + digit).filter(|n| *n <= MOST_TIMES);
            if number.is_none() {
                return self.wrong(&format!("at most {MOST_TIMES} repetitions can be asked for"));
            }
        }
        number.map_or_else(|| self.wrong("a number is expected"), Ok)
    }

    fn literal(&mut self) -> Result<Node, String> {
        self.at += 1;
        let mut all = Vec::new();
        while self.peek() != Some('"') {
            let letter = self.letter()?;
            all.push(Node::Letter(vec![(letter, letter)]));
        }
        self.at += 1;
        Ok(Node::Sequence(all))
    }

    fn class(&mut self) -> Result<Node, String> {
        self.at += 1;
        let negated = self.take('^');
        let mut ranges = Letters::new();
        while self.peek() != Some(']') {
            let from = self.letter()?;
            let ends = self.letters.get(self.at + 1) == Some(&']');
            let to = if self.peek() == Some('-') && !ends { self.range_end()? } else { from };
            if to < from {
                return self.wrong("a range of letters has its larger end first");
            }
            ranges.push((from, to));
        }
        self.at += 1;
        let ranges = ordered(ranges);
        let ranges = if negated { others(&ranges) } else { ranges };
        if ranges.is_empty() {
            return self.wrong("a class has no letters");
        }
        Ok(Node::Letter(ranges))
    }

    fn range_end(&mut self) -> Result<u32, String> {
        self.at += 1;
        self.letter()
    }

    /// A letter, or what stands for one after a backslash.
    fn letter(&mut self) -> Result<u32, String> {
        let Some(letter) = self.peek() else { return self.wrong("a literal or a class does not end") };
        self.at += 1;
        if letter != '\\' {
            return Ok(letter.into());
        }
        let escaped = self.peek();
        self.at += 1;
        let digits = match escaped {
            Some('x') => 2,
            Some('u') => 4,
            Some('U') => 8,
            Some('t') => return Ok(9),
            Some('n') => return Ok(10),
            Some('r') => return Ok(13),
            Some(c @ ('\\' | '"' | '[' | ']')) => return Ok(c.into()),
            _ => return self.wrong("after a backslash one of x, u, U, t, r, n, `\\`, `\"`, `[` and `]` is expected"),
        };
        let text: String = self.letters.iter().skip(self.at).take(digits).collect();
        let code = (text.len() == digits && text.bytes().all(|b| b.is_ascii_hexdigit()))
            .then(|| u32::from_str_radix(&text, 16).ok());
        match code.flatten().and_then(char::from_u32) {
            Some(letter) => {
                self.at += digits;
                Ok(letter.into())
            }
            None => self.wrong(&format!("{digits} hexadecimal digits of a letter are expected after the backslash")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_are_ranges_in_order() {
        assert_eq!(ordered(vec![(50, 60), (1, 3), (4, 9), (2, 2)]), [(1, 9), (50, 60)]);
        assert_eq!(ordered(vec![(0xd000, 0xe100)]), [(0xd000, 0xd7ff), (0xe000, 0xe100)]);
        assert_eq!(others(&vec![(0, 9), (11, 11)]), [(10, 10), (12, 0xd7ff), (0xe000, LAST)]);
        assert_eq!(others(&others(&vec![(0, LAST)])), ordered(vec![(0, LAST)]));
    }

    #[test]
    fn what_is_no_grammar_is_told_with_its_line() {
        for (text, line, says) in [
            ("", 0, "there is no rule `root`"),
            ("root ::= nowhere", 0, "there is no rule `nowhere`"),
            ("root ::= \"a\"\nroot ::= \"b\"", 0, "given twice"),
            ("root = \"a\"", 1, "`::=`"),
            ("root ::= \"a\"\n\nroot2 ::= (\"a\"", 3, "a `)` is missing"),
            ("root ::= \"a", 1, "does not end"),
            ("root ::= [a", 1, "does not end"),
            ("root ::= []", 1, "no letters"),
            ("root ::= [z-a]", 1, "larger end first"),
            ("root ::= \"\\q\"", 1, "after a backslash"),
            ("root ::= \"\\x0\"", 1, "2 hexadecimal digits"),
            ("root ::= \"\\ud800\"", 1, "4 hexadecimal digits"),
            ("root ::= \"\\UFFFFFFFF\"", 1, "8 hexadecimal digits"),
            ("root ::= \"a\"{3,2}", 1, "larger number first"),
            ("root ::= \"a\"{2001}", 1, "at most 2000"),
            ("root ::= \"a\"{99999999999999999999}", 1, "at most 2000"),
            ("root ::= \"a\"{", 1, "a number is expected"),
            ("root ::= \"a\"{2", 1, "`}` is missing"),
            ("root ::= <think> \"a\"", 1, "tokens"),
            ("root ::= !<[7]>", 1, "tokens"),
            ("root ::= \"a\" )", 1, "`)` is not expected"),
            ("root ::= *", 1, "`*` is not expected"),
            ("root ::= \"a\" @", 1, "`@` is not expected"),
        ] {
            let told = parse(text).unwrap_err();
            assert!(told.contains(says) && (line == 0 || told.starts_with(&format!("line {line} "))), "{text}: {told}");
        }
    }
}
