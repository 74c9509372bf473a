//! A run: from settings to an adapter folder, step by step, with what it leaves behind and what it takes.

pub mod attention;
pub mod beneath;
pub mod chart;
pub mod checkpoint;
pub mod evaluate;
pub mod frozen;
pub mod log;
pub mod optimize;
pub mod plan;
pub mod schedule;
pub mod session;
pub mod settings;
pub mod step;
pub mod trainer;
mod update;
