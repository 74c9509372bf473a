//! What is done with whole adapters: merging them into a base, cutting them to fewer ranks, changing them under a base in memory.

pub mod folder;
pub mod merge;
pub mod resize;
pub mod switch;
