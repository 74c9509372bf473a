//! What is done with whole adapters: combining them into one, merging them into a base, cutting them to fewer ranks, changing them under a base in memory.

pub mod combine;
pub mod merge;
pub mod resize;
pub mod switch;
