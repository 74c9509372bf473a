//! Generation with adapters over the same model code that trains: one answer at a time ([`generate()`]), or many requests for many adapters
//! of one base in one batch ([`Engine`]).

pub mod adapters;
pub mod answers;
pub mod engine;
pub mod error;
pub mod generation;
pub mod http;
pub mod trace;

pub use adapters::hosted::Hosted;
pub use adapters::store::{Store, StoreSettings};
pub use engine::scheduler::{Policy, Refusal};
pub use engine::worker::Worker;
pub use engine::{Engine, EngineSettings, EngineState, Event, Request, Token};
pub use error::{Error, Result};
pub use generation::generate::{FinishReason, Generation, generate};
pub use generation::sampling::Sampling;
pub use generation::stream::{TextOptions, TextStream};
