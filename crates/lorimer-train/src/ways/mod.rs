//! Ways to train: the mathematics of what a method's `Training` names.

pub mod callback;
pub mod objective;
pub mod optimizer;
pub mod search;
