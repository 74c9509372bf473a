//! Training and evaluation: data to tokens ([`data`]), a look at them before ([`calibrate`]), and the loop with its schedule, checkpoints, logs and evaluation ([`run`]), all of it in one call ([`run::session`]); many clients that train one adapter together ([`federate`]).

pub mod calibrate;
pub mod data;
pub mod error;
pub mod federate;
pub mod quantize;
pub mod run;

pub use data::encode::{DataReport, EncodeOptions, Example, TooLong};
pub use error::{Error, Result};
pub use run::evaluate::{Evaluation, evaluate, find_choices};
pub use run::session::Session;
pub use run::trainer::{Event, Outcome, Run, TrainSettings};
