//! Where models and adapters meet. A model is a frozen function of blocks ([`BaseModel`]); whatever is done to its projections, attentions and
//! hidden states is an [`Adaptation`]. Neither knows the other: this crate knows no model's files and no method.

pub mod adaptation;
pub mod batch;
pub mod layout;
pub mod model;
pub mod scope;
pub mod site;

pub use adaptation::{Adaptation, AttentionCall, Frozen, Inference, LastPass, PassDone, Point};
pub use batch::Batch;
pub use layout::{Frequencies, Input, KvCache, LayerShape, Layout, ModelShape};
pub use model::{BaseModel, Recompute, TooLong, earlier_passes, last_pass, run_blocks, whole_pass};
pub use scope::{BlockScope, KeepRows};
pub use site::{Projection, Site};
