//! One answer at a time: how a token is drawn, and how tokens become text as they come.

pub mod form;
mod gbnf;
pub mod generate;
pub mod sampling;
pub mod stream;
pub mod tools;
