//! Grammars of llama.cpp, held against what they say letter by letter.

use std::collections::{BTreeSet, HashMap};

use lorimer_model::TextModel;
use proptest::prelude::*;

use super::parse::{Node, parse};
use super::to_lark;
use crate::generation::form::{Form, Vocabulary};

struct Own {
    text: TextModel,
    vocabulary: Vocabulary,
}

impl Own {
    fn new() -> Self {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/tiny-llama");
        let text = TextModel::from_folder(&folder).unwrap();
        let vocabulary = Vocabulary::new(&text, text.vocabulary()).unwrap();
        Self { text, vocabulary }
    }

    /// Whether a text is a beginning of what a grammar gives, and whether it is the whole of it.
    fn follows(&self, grammar: &str, answer: &str) -> (bool, bool) {
        let begun = self.vocabulary.begin(&Form::Gbnf(grammar.into()));
        let mut constraint =
            begun.unwrap_or_else(|e| panic!("{e}: {grammar}\n{}", to_lark(grammar).unwrap_or_default()));
        let size = self.text.vocabulary();
        for id in self.text.encode(answer, false).unwrap().ids {
            let mut logits = vec![0f32; size];
            constraint.restrict(&mut logits).unwrap_or_else(|e| panic!("{e}: {grammar}"));
            if logits[id as usize] != 0.0 {
                return (false, false);
            }
            constraint.push(id).unwrap();
        }
        let mut logits = vec![0f32; size];
        constraint.restrict(&mut logits).unwrap();
        (true, self.text.eos_ids.iter().all(|&id| logits[id as usize] == 0.0))
    }
}

/// Where a text that a node gives, from a place on, can end; what rules give is asked for until nothing new comes.
fn ends(node: &Node, text: &[u32], at: usize, known: &mut HashMap<(usize, usize), BTreeSet<usize>>) -> BTreeSet<usize> {
    match node {
        Node::Letter(letters) => {
            let fits = |c: &u32| letters.iter().any(|(from, to)| from <= c && c <= to);
            text.get(at).filter(|c| fits(c)).map(|_| at + 1).into_iter().collect()
        }
        Node::Rule(number) => known.entry((*number, at)).or_default().clone(),
        Node::Choice(all) => all.iter().flat_map(|node| ends(node, text, at, known)).collect(),
        Node::Sequence(all) => all.iter().fold(BTreeSet::from([at]), |from, node| {
            from.into_iter().flat_map(|at| ends(node, text, at, known)).collect()
        }),
        Node::Repeat(inner, least, most) => {
            let (mut all, mut now) = (BTreeSet::new(), BTreeSet::from([at]));
            let enough = *least as usize + text.len() + 1;
            for i in 0..=most.map_or(enough, |most| enough.min(most as usize)) {
                if i >= *least as usize {
                    all.extend(&now);
                }
                now = now.into_iter().flat_map(|at| ends(inner, text, at, known)).collect();
            }
            all
        }
    }
}

/// Whether a grammar gives a text.
fn gives(rules: &[Node], text: &str) -> bool {
    let text: Vec<u32> = text.chars().map(u32::from).collect();
    let mut known: HashMap<(usize, usize), BTreeSet<usize>> = HashMap::new();
    ends(&Node::Rule(0), &text, 0, &mut known);
    loop {
        let before = known.clone();
        for (number, at) in before.keys() {
            let now = ends(&rules[*number], &text, *at, &mut known);
            known.insert((*number, *at), now);
        }
        if known == before {
            return known[&(0, 0)].contains(&text.len());
        }
    }
}

const JSON: &str = r#"
# in the manner of llama.cpp's own
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws
array  ::= "[" ws (value ("," ws value)*)? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9]{1,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"#;
const ARITHMETIC: &str = "root ::= (expr \"=\" ws term \"\\n\")+\nexpr ::= term ([-+*/] term)*\nterm ::= ident | num | \"(\" ws expr \")\" ws\nident ::= [a-z] [a-z0-9_]* ws\nnum ::= [0-9]+ ws\nws ::= [ \\t\\n]*";
const CHESS: &str = "root ::= \"1. \" move \" \" move \"\\n\" ([1-9] [0-9]? \". \" move \" \" move \"\\n\")+\nmove ::= (pawn | nonpawn | castle) [+#]?\nnonpawn ::= [NBKQR] [a-h]? [1-8]? \"x\"? [a-h] [1-8]\npawn ::= ([a-h] \"x\")? [a-h] [1-8] (\"=\" [NBKQR])?\ncastle ::= \"O-O\" \"-O\"?";
const LIST: &str = "root ::= item+\nitem ::= \"- \" [^\\r\\n\\x0b\\x0c\\x85\\u2028\\u2029]+ \"\\n\"";
const C: &str = r#"
root ::= (declaration)*
declaration ::= type identifier "(" parameter? ")" "{" statement* "}"
type ::= "int" ws | "float" ws | "char" ws
identifier ::= [a-zA-Z_] [a-zA-Z_0-9]*
parameter ::= type identifier
statement ::=
    ( type identifier ws "=" ws expression ";" ) |
    ( identifier ws "=" ws expression ";" ) |
    ( "return" ws expression ";" ) |
    ( "while" "(" expression ")" "{" statement* "}" ) |
    ( "//" [^\n]* "\n" ) |
    ( "/*" ( [^*] | ("*" [^/]) )* "*/" )
expression ::= term (("+" | "-") term)*
term ::= factor(("*" | "/") factor)*
factor ::= identifier | [0-9]+ | "-" factor | "(" ws expression ws ")"
ws ::= ([ \t\n]+)
"#;

/// The kinds of grammars that llama.cpp has beside its code. To be seen to fail: lexemes that are not taken apart ([`ARITHMETIC`]).
#[test]
fn grammars_of_llama_cpp_are_followed() {
    let own = Own::new();
    for (grammar, answer, expected) in [
        (JSON, "{\"a\": [1, -2.5e3, {\"b\": null}], \"c\":\"d\\u00e9 \\n é\"}", (true, true)),
        (JSON, "{}", (true, true)),
        (JSON, "{\"a\": 1", (true, false)),
        (JSON, "{\"a\": tru", (true, false)),
        (JSON, "{\"a\": 01", (false, false)),
        (JSON, "{\"a\"  : 1}", (false, false)),
        (JSON, "[1]", (false, false)),
        (ARITHMETIC, "x1+(2*y)= 7\n", (true, true)),
        (ARITHMETIC, "1=2\n3=4\n\n", (true, true)),
        (ARITHMETIC, "1=2", (true, false)),
        (ARITHMETIC, "1=2 \na*b=c\n", (true, true)),
        (ARITHMETIC, "1==", (false, false)),
        (CHESS, "1. e4 e5\n2. Nf3 Nc6\n10. O-O-O+ axb8=Q#\n", (true, true)),
        (CHESS, "1. e4 e5\n", (true, false)),
        (CHESS, "1. e9", (false, false)),
        (LIST, "- eggs é 東\n- milk\n", (true, true)),
        (LIST, "- eggs", (true, false)),
        (LIST, "-eggs", (false, false)),
        (C, "int f(char c){int x = 3+y;returnx = 1;return ( a );while(x){}/* * *a*/// é\n}", (true, true)),
        (C, "int main(){return 1*-2;}", (true, true)),
        (C, "", (true, true)),
        (C, "int 3", (false, false)),
        ("root ::= [ぁ-ゟ]+ ([、-〾] root)?", "ひら、がな", (true, true)),
        ("root ::= [ぁ-ゟ]+ ([、-〾] root)?", "hira", (false, false)),
        ("root ::= .", "é", (true, true)),
        ("root ::= . | \"\\U0001F642\" \"x\"", "🙂", (true, true)),
        ("root ::= . | \"\\U0001F642\" \"x\"", "🙂x", (true, true)),
        (
            "root ::= \"a\" | (\"b\"\n | \"c\" # one\n) |\n \"\\\"\\\\\\t\\r\\n\\x41\\u0042\\[\\]/\"",
            "\"\\\t\r\nAB[]/",
            (true, true),
        ),
        ("root ::= item{2} tail{1,3}\nitem ::= [^a-y]\ntail ::= [-a]", "zz-a", (true, true)),
        ("root ::= \"ab\" root \"c\" | [a-c]", "ababcac", (false, false)),
        ("root ::= \"ab\" root \"c\" | [a-c]", "ababacc", (true, true)),
        ("root ::= \"a\"{0}", "", (true, true)),
        ("root ::= [a-b]* \"a\" | \"(\" root \")\"", "(abba)", (true, true)),
    ] {
        assert_eq!(own.follows(grammar, answer), expected, "{answer:?}\n{}", to_lark(grammar).unwrap());
        let whole = gives(&parse(grammar).unwrap(), answer);
        assert_eq!(whole, expected.1, "{answer:?}");
    }
}

/// Expressions over few letters, in which everything stands in the way of everything.
fn expression() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        Just("\"a\"".to_string()),
        Just("\"ab\"".to_string()),
        Just("\"ba\"".to_string()),
        Just("\"aab\"".to_string()),
        Just("[ab]".to_string()),
        Just("[^b]".to_string()),
        Just("\"\"".to_string()),
        Just("root".to_string()),
        Just("x".to_string()),
        Just("y".to_string()),
    ];
    leaf.prop_recursive(3, 12, 3, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 1..4).prop_map(|all| format!("({})", all.join(" "))),
            proptest::collection::vec(inner.clone(), 1..4).prop_map(|all| format!("({})", all.join(" | "))),
            (
                inner,
                prop_oneof![Just("*"), Just("+"), Just("?"), Just("{2}"), Just("{1,2}"), Just("{0,1}"), Just("{2,}")]
            )
                .prop_map(|(inner, times)| format!("({inner}){times}")),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..Default::default() })]

    /// What a grammar gives letter by letter is what is followed, and nothing else. To be seen to fail: conflicts that are not looked for, or only of
    /// one lexeme with itself.
    #[test]
    fn what_is_followed_is_what_a_grammar_gives(root in expression(), x in expression(), y in expression()) {
        thread_local! {
            static OWN: Own = Own::new();
        }
        // Something always ends.
        let grammar = format!("root ::= {root} | \"b\"\nx ::= {x} | \"a\"\ny ::= {y}");
        let rules = parse(&grammar).unwrap();
        OWN.with(|own| {
            for length in 0..5u32 {
                for bits in 0..1 << length {
                    let answer: String = (0..length).map(|i| if bits >> i & 1 == 0 { 'a' } else { 'b' }).collect();
                    let (_, whole) = own.follows(&grammar, &answer);
                    assert_eq!(whole, gives(&rules, &answer), "{grammar}\n{answer}\n{}", to_lark(&grammar).unwrap());
                }
            }
        });
    }
}
