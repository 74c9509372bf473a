//! What is done with whole adapters: combining them into one, merging them into a base, cutting them to fewer ranks, cutting units out of a base and
//! bringing what was trained on the smaller one back, changing them under a base in memory.

pub mod combine;
pub mod folder;
pub mod merge;
pub mod recover;
pub mod resize;
pub mod slice;
pub mod switch;
