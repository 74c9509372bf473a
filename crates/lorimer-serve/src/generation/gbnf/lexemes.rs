//! Which parts of a grammar may be lexemes: cut as long as they can be, they are where the grammar has them.
//!
//! A cut is wrong where one lexeme ends, what may follow it comes, and another that might stand there too (or the same) goes on with that. Whatever so goes
//! on is taken apart, down to single letters, which never do.

use std::collections::{HashMap, HashSet};

use super::automaton::Automaton;
use super::parse::{Letters, Node};

/// Steps of all comparisons; a grammar that takes more is taken apart whole.
const BUDGET: usize = 2_000_000;
/// Most lexemes that are compared, and how often parts may be taken apart.
const MOST: usize = 300;
const ROUNDS: usize = 32;

/// A rule over lexemes.
#[derive(Clone, Debug)]
pub enum Tree {
    /// A lexeme by its number.
    Lexeme(usize),
    /// A rule of the grammar.
    Rule(usize),
    /// One after the other.
    Sequence(Vec<Tree>),
    /// One of them.
    Choice(Vec<Tree>),
    /// So many times.
    Repeat(Box<Tree>, u32, Option<u32>),
}

/// A grammar over lexemes.
pub struct Lexed {
    /// Rules that are used, by number; `root` is 0.
    pub rules: Vec<Option<Tree>>,
    /// Lexemes, each with whether it may be empty.
    pub lexemes: Vec<(Node, bool)>,
}

/// Whether each rule is regular: it gives itself in no way, nor gives one that does.
pub fn regular(rules: &[Node]) -> Vec<bool> {
    fn within(node: &Node, into: &mut Vec<usize>) {
        match node {
            Node::Letter(_) => {}
            Node::Rule(number) => into.push(*number),
            Node::Sequence(all) | Node::Choice(all) => all.iter().for_each(|node| within(node, into)),
            Node::Repeat(inner, ..) => within(inner, into),
        }
    }
    let mut missing: Vec<usize> = vec![0; rules.len()];
    let mut users: Vec<Vec<usize>> = vec![Vec::new(); rules.len()];
    for (number, rule) in rules.iter().enumerate() {
        let mut used = Vec::new();
        within(rule, &mut used);
        used.sort_unstable();
        used.dedup();
        missing[number] = used.len();
        used.iter().for_each(|&used| users[used].push(number));
    }
    // Those that use nothing that is not known to be regular, one after the other.
    let mut known: Vec<usize> = (0..rules.len()).filter(|&i| missing[i] == 0).collect();
    let mut regular = vec![false; rules.len()];
    while let Some(number) = known.pop() {
        regular[number] = true;
        for &user in &users[number] {
            missing[user] -= 1;
            if missing[user] == 0 {
                known.push(user);
            }
        }
    }
    regular
}

struct Cutter<'a> {
    rules: &'a [Node],
    regular: &'a [bool],
    /// What is no lexeme.
    apart: HashSet<Node>,
    /// Whether nothing but single letters is one.
    all_apart: bool,
    numbers: HashMap<Node, usize>,
    lexemes: Vec<Node>,
    used: Vec<usize>,
}

impl Cutter<'_> {
    fn is_regular(&self, node: &Node) -> bool {
        match node {
            Node::Letter(_) => true,
            Node::Rule(number) => self.regular[*number],
            Node::Sequence(all) | Node::Choice(all) => all.iter().all(|node| self.is_regular(node)),
            Node::Repeat(inner, ..) => self.is_regular(inner),
        }
    }

    fn tree(&mut self, node: &Node) -> Tree {
        let empty =
            matches!(node, Node::Sequence(all) if all.is_empty()) || matches!(node, Node::Repeat(_, _, Some(0)));
        if empty {
            return Tree::Sequence(Vec::new());
        }
        let letter = matches!(node, Node::Letter(_));
        if letter || self.is_regular(node) && !self.all_apart && !self.apart.contains(node) {
            let next = self.lexemes.len();
            let number = *self.numbers.entry(node.clone()).or_insert(next);
            if number == next {
                self.lexemes.push(node.clone());
            }
            return Tree::Lexeme(number);
        }
        match node {
            Node::Rule(number) => {
                self.used.push(*number);
                Tree::Rule(*number)
            }
            Node::Choice(all) => Tree::Choice(all.iter().map(|node| self.tree(node)).collect()),
            Node::Repeat(inner, least, most) => Tree::Repeat(Box::new(self.tree(inner)), *least, *most),
            Node::Letter(_) => Tree::Sequence(Vec::new()),
            Node::Sequence(all) => {
                // Neighbours that are regular together, unless they are what is taken apart.
                let whole = self.is_regular(node);
                let (mut trees, mut run): (Vec<Tree>, Vec<Node>) = (Vec::new(), Vec::new());
                for node in all {
                    if !whole && self.is_regular(node) {
                        run.push(node.clone());
                        continue;
                    }
                    self.end(&mut run, &mut trees);
                    trees.push(self.tree(node));
                }
                self.end(&mut run, &mut trees);
                Tree::Sequence(trees)
            }
        }
    }

    fn end(&mut self, run: &mut Vec<Node>, trees: &mut Vec<Tree>) {
        let node = match run.len() {
            0 => return,
            1 => run.remove(0),
            _ => Node::Sequence(std::mem::take(run)),
        };
        trees.push(self.tree(&node));
    }

    fn cut(mut self) -> (Vec<Option<Tree>>, Vec<Node>) {
        let mut rules: Vec<Option<Tree>> = vec![None; self.rules.len()];
        self.used.push(0);
        while let Some(number) = self.used.pop() {
            if rules[number].is_none() {
                rules[number] = Some(self.tree(&self.rules[number]));
            }
        }
        (rules, self.lexemes)
    }
}

/// A set of lexemes.
#[derive(Clone, PartialEq)]
struct Set(Vec<u64>);

impl Set {
    fn new(size: usize) -> Self {
        Self(vec![0; size.div_ceil(64)])
    }
    fn insert(&mut self, at: usize) {
        self.0[at / 64] |= 1 << (at % 64);
    }
    /// Whether something came.
    fn add(&mut self, other: &Self) -> bool {
        let mut more = false;
        for (a, b) in self.0.iter_mut().zip(&other.0) {
            more |= *b & !*a != 0;
            *a |= b;
        }
        more
    }
    fn all(&self) -> impl Iterator<Item = usize> {
        self.0
            .iter()
            .enumerate()
            .flat_map(|(i, word)| (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| i * 64 + bit))
    }
}

/// What a rule may begin and end with, and whether it may be empty.
#[derive(Clone, PartialEq)]
struct Ends {
    nullable: bool,
    first: Set,
    last: Set,
}

struct Following<'a> {
    nullable: &'a [bool],
    rules: Vec<Ends>,
    /// What may come after each lexeme.
    next: Vec<Set>,
}

impl Following<'_> {
    fn ends(&mut self, tree: &Tree) -> Ends {
        let size = self.nullable.len();
        let mut whole = Ends { nullable: true, first: Set::new(size), last: Set::new(size) };
        match tree {
            Tree::Lexeme(number) => {
                whole.nullable = self.nullable[*number];
                whole.first.insert(*number);
                whole.last.insert(*number);
            }
            Tree::Rule(number) => return self.rules[*number].clone(),
            Tree::Sequence(all) => {
                for tree in all {
                    let next = self.ends(tree);
                    self.join(&whole.last, &next.first);
                    if whole.nullable {
                        whole.first.add(&next.first);
                    }
                    if next.nullable {
                        whole.last.add(&next.last);
                    } else {
                        whole.last = next.last;
                    }
                    whole.nullable &= next.nullable;
                }
            }
            Tree::Choice(all) => {
                whole.nullable = false;
                for tree in all {
                    let next = self.ends(tree);
                    whole.first.add(&next.first);
                    whole.last.add(&next.last);
                    whole.nullable |= next.nullable;
                }
            }
            Tree::Repeat(inner, least, most) => {
                whole = self.ends(inner);
                if *most != Some(1) {
                    let (last, first) = (whole.last.clone(), whole.first.clone());
                    self.join(&last, &first);
                }
                whole.nullable |= *least == 0;
            }
        }
        whole
    }

    fn join(&mut self, last: &Set, first: &Set) {
        for at in last.all() {
            self.next[at].add(first);
        }
    }
}

/// What can stand at the beginning, and what after each lexeme.
fn following(rules: &[Option<Tree>], nullable: &[bool]) -> (Set, Vec<Set>) {
    let size = nullable.len();
    let nothing = Ends { nullable: false, first: Set::new(size), last: Set::new(size) };
    let mut all = Following { nullable, rules: vec![nothing; rules.len()], next: vec![Set::new(size); size] };
    loop {
        let (mut changed, before) = (false, all.next.clone());
        for (number, rule) in rules.iter().enumerate() {
            let Some(rule) = rule else { continue };
            let ends = all.ends(rule);
            changed |= ends != all.rules[number];
            all.rules[number] = ends;
        }
        if !changed && before == all.next {
            return (all.rules[0].first.clone(), all.next);
        }
    }
}

/// The lexemes that have to be taken apart; None where it takes too long to tell.
fn conflicts(rules: &[Option<Tree>], automata: &[Automaton], budget: &mut usize) -> Option<HashSet<usize>> {
    let nullable: Vec<bool> = automata.iter().map(|a| a.nullable).collect();
    let (start, next) = following(rules, &nullable);
    let after: Vec<Vec<&Letters>> =
        next.iter().map(|next| next.all().flat_map(|at| automata[at].begins()).collect()).collect();
    let mut met: HashMap<(usize, usize), (bool, bool)> = HashMap::new();
    // Lexemes that a text may both be: what may come after one may come after the other.
    let mut places = next.clone();
    places.push(start);
    let mut apart = HashSet::new();
    loop {
        let mut changed = false;
        for place in 0..places.len() {
            let here: Vec<usize> = places[place].all().collect();
            for &one in &here {
                for &other in &here {
                    *budget = budget.checked_sub(1)?;
                    let (both, beyond) = match met.get(&(one, other)) {
                        Some(known) => *known,
                        None => {
                            let found = automata[one].meets(&automata[other], &after[one], budget)?;
                            met.insert((one, other), found);
                            found
                        }
                    };
                    if beyond {
                        apart.insert(other);
                    }
                    if both && one != other {
                        let from = places[other].clone();
                        changed |= places[one].add(&from);
                    }
                }
            }
        }
        if !changed {
            return Some(apart);
        }
    }
}

/// Cuts a grammar into lexemes.
pub fn cut(rules: &[Node]) -> Lexed {
    let regular = regular(rules);
    let mut apart: HashSet<Node> = HashSet::new();
    let (mut all_apart, mut budget, mut round) = (false, BUDGET, 0);
    let empty = may_be_empty(rules, &regular);
    loop {
        round += 1;
        all_apart |= round > ROUNDS;
        let cutter = Cutter {
            rules,
            regular: &regular,
            apart: apart.clone(),
            all_apart,
            numbers: HashMap::new(),
            lexemes: Vec::new(),
            used: Vec::new(),
        };
        let (trees, lexemes) = cutter.cut();
        // A grammar that is one lexeme has nothing to be cut.
        let whole = matches!(trees.first(), Some(Some(Tree::Lexeme(_))));
        let many = lexemes.len() > MOST;
        let automata: Vec<Option<Automaton>> = match all_apart || whole || many {
            true => Vec::new(),
            false => lexemes.iter().map(|node| Automaton::of(node, rules)).collect(),
        };
        let large: Vec<&Node> =
            lexemes.iter().zip(&automata).filter(|(_, a)| a.is_none()).map(|(node, _)| node).collect();
        if !large.is_empty() {
            apart.extend(large.into_iter().cloned());
            continue;
        }
        let found = if all_apart || whole {
            Some(HashSet::new())
        } else if many {
            None
        } else {
            let automata: Vec<Automaton> = automata.into_iter().flatten().collect();
            conflicts(&trees, &automata, &mut budget)
        };
        match found {
            None => all_apart = true,
            Some(found) if found.is_empty() => {
                let nullable = |node: Node| (node.clone(), node_may_be_empty(&node, &empty));
                let lexemes = lexemes.into_iter().map(nullable).collect();
                return Lexed { rules: trees, lexemes };
            }
            Some(found) => apart.extend(found.into_iter().map(|at| lexemes[at].clone())),
        }
    }
}

/// Whether each rule, if it is regular, may be empty.
fn may_be_empty(rules: &[Node], regular: &[bool]) -> Vec<bool> {
    let mut empty = vec![false; rules.len()];
    loop {
        let now: Vec<bool> = (0..rules.len()).map(|i| regular[i] && node_may_be_empty(&rules[i], &empty)).collect();
        if now == empty {
            return empty;
        }
        empty = now;
    }
}

fn node_may_be_empty(node: &Node, empty: &[bool]) -> bool {
    match node {
        Node::Letter(_) => false,
        Node::Rule(number) => empty[*number],
        Node::Sequence(all) => all.iter().all(|node| node_may_be_empty(node, empty)),
        Node::Choice(all) => all.iter().any(|node| node_may_be_empty(node, empty)),
        Node::Repeat(inner, least, _) => *least == 0 || node_may_be_empty(inner, empty),
    }
}
