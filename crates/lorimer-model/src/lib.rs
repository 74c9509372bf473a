//! The seam ([`Adaptation`]), base models behind it, and how they are loaded and fetched.

pub mod base;
pub mod batch;
pub mod config;
pub mod error;
pub mod files;
pub mod http;
pub mod llama;
pub mod pull;
pub mod seam;
pub mod text;
pub mod weights;

pub use base::{Base, OpenOptions, Prepared};
pub use batch::Batch;
pub use error::{Error, Result};
pub use llama::{KvCache, Llama};
pub use seam::{Adaptation, AttentionCall, BaseModel, Frozen, Inference, Point, Projection, Site};
pub use text::TextModel;
pub use weights::{LoadDtype, Weights};
