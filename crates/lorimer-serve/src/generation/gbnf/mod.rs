//! llama.cpp's grammars (GBNF) in llguidance's dialect of Lark.
//!
//! In GBNF a grammar goes letter by letter. llguidance cuts the answer into lexemes first, each as long as it can be, and never takes that back. So what is
//! regular in a grammar becomes lexemes only where the longest one is always the right one ([`lexemes`]); elsewhere it becomes rules over single
//! letters, which are followed as exactly and more slowly.

mod automaton;
mod lexemes;
mod parse;
mod write;

pub use write::to_lark;

#[cfg(test)]
mod tests;
