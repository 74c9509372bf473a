//! Generation with adapters over the same model code that trains: one answer at a time ([`generate()`]), or many requests for many adapters
//! of one base in one batch ([`Engine`]).

pub mod batched;
pub mod batching;
pub mod engine;
pub mod error;
pub mod generate;
pub mod hosted;
pub mod http;
pub mod mirror;
pub mod pool;
pub mod prefix;
pub mod registry;
pub mod replay;
pub mod residency;
pub mod residents;
pub mod sampling;
pub mod scheduler;
pub mod simulate;
pub mod store;
pub mod stream;
pub mod worker;
pub mod workload;

pub use engine::{Engine, EngineSettings, EngineState, Event, Request, Token};
pub use error::{Error, Result};
pub use generate::{FinishReason, Generation, generate};
pub use hosted::Hosted;
pub use sampling::Sampling;
pub use scheduler::{Policy, Refusal};
pub use store::{Store, StoreSettings};
pub use stream::{TextOptions, TextStream};
pub use worker::Worker;
