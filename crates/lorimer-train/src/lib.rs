//! Training and evaluation: data to tokens ([`encode`]), the loop ([`trainer`]), optimisers, schedules, checkpoints,
//! logs, evaluation, and all of it in one call ([`session`]).

mod answers;
pub mod calibrate;
pub mod checkpoint;
pub mod control;
pub mod data;
pub mod encode;
pub mod error;
pub mod evaluate;
pub mod frozen;
pub mod log;
pub mod objective;
pub mod optimizer;
pub mod plan;
pub mod scatter;
pub mod schedule;
pub mod search;
pub mod session;
pub mod step;
pub mod trainer;

pub use encode::{DataReport, EncodeOptions, Example, TooLong};
pub use error::{Error, Result};
pub use evaluate::{Evaluation, evaluate, find_choices};
pub use session::Session;
pub use trainer::{Event, Outcome, Run, TrainSettings};
