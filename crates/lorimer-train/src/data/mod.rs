//! Training data: five shapes of rows in four kinds of files.

mod answers;
pub mod encode;
mod read;
mod row;
mod sample;
#[cfg(test)]
mod tests;

pub use read::{detect, read_rows};
pub use row::{Format, Row, Sample};
pub use sample::sample;
