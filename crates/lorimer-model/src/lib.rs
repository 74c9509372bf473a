//! Base models behind the seam ([`Adaptation`], [`BaseModel`]), and how they are loaded and fetched.

pub mod base;
pub mod decoder;
pub mod embed;
pub mod error;
pub mod families;
pub mod files;
pub mod http;
mod linear;
pub mod protobuf;
pub mod pull;
pub mod text;
pub mod weights;

pub use base::{Base, OpenOptions, Prepared};
pub use decoder::{Decoder, DecoderConfig};
pub use error::{Error, Result};
pub use families::Config;
pub use lorimer_seam::{
    Adaptation, AttentionCall, BaseModel, Batch, BlockScope, Frequencies, Frozen, Inference, Input, KeepRows, KvCache,
    LastPass, LayerShape, Layout, ModelShape, PassDone, Point, Projection, Recompute, Site, earlier_passes, last_pass,
    run_blocks, whole_pass,
};
pub use text::TextModel;
pub use weights::{LoadDtype, Weights};
