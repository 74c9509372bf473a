//! What is regular, as positions (Glushkov's automaton): enough to tell whether one lexeme can end where another goes on.

use std::collections::HashSet;

use super::parse::{Letters, Node};

/// Most copies of what is repeated; of more it is taken that any number may come, which only finds more conflicts.
const COPIES: u32 = 4;
/// Most positions of an automaton, and most steps from one to the next.
const POSITIONS: usize = 2000;
const STEPS: usize = 40_000;

/// Positions of letters in a regular expression.
pub struct Automaton {
    letters: Vec<Letters>,
    first: Vec<usize>,
    /// Whether a text may end at a position.
    last: Vec<bool>,
    follow: Vec<Vec<usize>>,
    /// Whether it has the empty text.
    pub nullable: bool,
}

/// A part of an expression.
struct Part {
    nullable: bool,
    first: Vec<usize>,
    last: Vec<usize>,
}

fn overlap(a: &Letters, b: &Letters) -> bool {
    a.iter().any(|(from, to)| b.iter().any(|(f, t)| from <= t && f <= to))
}

/// The first byte of a letter in UTF-8, which grows with the letter.
fn first_byte(letter: u32) -> u32 {
    match letter {
        0..0x80 => letter,
        0x80..0x800 => 0xc0 | letter >> 6,
        0x800..0x1_0000 => 0xe0 | letter >> 12,
        _ => 0xf0 | letter >> 18,
    }
}

/// Whether some letters of both begin with the same byte: answers are cut byte by byte.
fn begin_alike(a: &Letters, b: &Letters) -> bool {
    let bytes = |all: &Letters| all.iter().map(|&(from, to)| (first_byte(from), first_byte(to))).collect::<Letters>();
    overlap(&bytes(a), &bytes(b))
}

impl Automaton {
    /// Of a part of a grammar whose rules are regular; None where it would be too large.
    pub fn of(node: &Node, rules: &[Node]) -> Option<Self> {
        let mut all = Self { letters: vec![], first: vec![], last: vec![], follow: vec![], nullable: false };
        let mut steps = 0;
        let part = all.part(node, rules, &mut steps)?;
        all.last = vec![false; all.letters.len()];
        part.last.iter().for_each(|&p| all.last[p] = true);
        all.follow.iter_mut().for_each(|follow| {
            follow.sort_unstable();
            follow.dedup();
        });
        (all.first, all.nullable) = (part.first, part.nullable);
        Some(all)
    }

    /// Everything in `to` may follow everything in `from`.
    fn join(&mut self, from: &[usize], to: &[usize], steps: &mut usize) -> Option<()> {
        *steps += from.len() * to.len();
        if *steps > STEPS {
            return None;
        }
        from.iter().for_each(|&p| self.follow[p].extend(to));
        Some(())
    }

    fn part(&mut self, node: &Node, rules: &[Node], steps: &mut usize) -> Option<Part> {
        // Empty parts take time too.
        *steps += 1;
        if *steps > STEPS {
            return None;
        }
        match node {
            Node::Letter(letters) => {
                let position = self.letters.len();
                if position == POSITIONS {
                    return None;
                }
                self.letters.push(letters.clone());
                self.follow.push(Vec::new());
                Some(Part { nullable: false, first: vec![position], last: vec![position] })
            }
            Node::Rule(number) => self.part(&rules[*number], rules, steps),
            Node::Sequence(all) => {
                let mut whole = Part { nullable: true, first: vec![], last: vec![] };
                for node in all {
                    let next = self.part(node, rules, steps)?;
                    whole = self.then(whole, next, steps)?;
                }
                Some(whole)
            }
            Node::Choice(all) => {
                let mut whole = Part { nullable: false, first: vec![], last: vec![] };
                for node in all {
                    let next = self.part(node, rules, steps)?;
                    whole.nullable |= next.nullable;
                    whole.first.extend(next.first);
                    whole.last.extend(next.last);
                }
                Some(whole)
            }
            Node::Repeat(inner, least, most) => {
                let mut whole = Part { nullable: true, first: vec![], last: vec![] };
                if *most == Some(0) {
                    return Some(whole);
                }
                let bounded = most.is_some_and(|most| most <= COPIES);
                let copies = if bounded { most.unwrap_or(1) } else { (*least).clamp(1, COPIES) };
                for copy in 0..copies {
                    let mut next = self.part(inner, rules, steps)?;
                    if !bounded && copy + 1 == copies {
                        let (last, first) = (next.last.clone(), next.first.clone());
                        self.join(&last, &first, steps)?;
                    }
                    next.nullable |= copy >= *least;
                    whole = self.then(whole, next, steps)?;
                }
                Some(whole)
            }
        }
    }

    fn then(&mut self, one: Part, next: Part, steps: &mut usize) -> Option<Part> {
        self.join(&one.last, &next.first, steps)?;
        let mut whole = Part { nullable: one.nullable && next.nullable, first: one.first, last: next.last };
        if one.nullable {
            whole.first.extend(next.first);
        }
        if next.nullable {
            whole.last.extend(one.last);
        }
        Some(whole)
    }

    /// The letters that a text can begin with.
    pub fn begins(&self) -> impl Iterator<Item = &Letters> {
        self.first.iter().map(|&p| &self.letters[p])
    }

    /// What is so of this one and another: whether some text is in both, and whether some text of this one, with a letter of `after` behind it, is the beginning of one
    /// of the other. None where it takes too long to tell.
    pub fn meets(&self, other: &Self, after: &[&Letters], budget: &mut usize) -> Option<(bool, bool)> {
        let (mut both, mut beyond) = (false, false);
        let mut seen: HashSet<(usize, usize)> = HashSet::new();
        let mut next: Vec<(usize, usize)> = Vec::new();
        let mut pairs = |from: &[usize], to: &[usize], next: &mut Vec<(usize, usize)>, budget: &mut usize| {
            for &p in from {
                for &q in to {
                    *budget = budget.checked_sub(1)?;
                    if overlap(&self.letters[p], &other.letters[q]) && seen.insert((p, q)) {
                        next.push((p, q));
                    }
                }
            }
            Some(())
        };
        pairs(&self.first, &other.first, &mut next, budget)?;
        while let Some((p, q)) = next.pop() {
            both |= self.last[p] && other.last[q];
            if self.last[p] && !beyond {
                *budget = budget.checked_sub(other.follow[q].len() * after.len())?;
                beyond =
                    other.follow[q].iter().any(|&q| after.iter().any(|after| begin_alike(after, &other.letters[q])));
            }
            if both && beyond {
                break;
            }
            pairs(&self.follow[p], &other.follow[q], &mut next, budget)?;
        }
        Some((both, beyond))
    }
}
