//! Lorimer: one engine for the whole life of low-rank adapters. This crate gathers the others under one name.
//!
//! ```no_run
//! use lorimer::prelude::*;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let pulled = pull("smollm2-135m", PullOptions::default())?;
//! let base = Base::open(&pulled.path, &OpenOptions::default())?;
//! let stored = StoredAdapter::read("runs/quickstart".as_ref())?;
//! let adapter = Adapter::load_whole(base.model(), &stored)?;
//! let prompt = base.text.encode("Hello", true)?;
//! let answer = generate(
//!     base.model(), &base.text, &Attached::one(&adapter), &prompt.ids, 32, &Sampling::default(), 0, &[], |_| {},
//! )?;
//! println!("{}", answer.text);
//! # Ok(())
//! # }
//! ```

pub use lorimer_adapter as adapter;
pub use lorimer_model as model;
pub use lorimer_serve as serve;
pub use lorimer_tensor as tensor;
pub use lorimer_train as train;

#[doc(hidden)]
pub mod program;
mod subcommands;

// What the subcommands call it.
extern crate self as lorimer;

/// The names that most programs need.
pub mod prelude {
    pub use lorimer_adapter::{Adapter, Attached, Delta, Method, Step, StoredAdapter, methods};
    pub use lorimer_model::pull::{PullOptions, pull};
    pub use lorimer_model::{
        Adaptation, Base, BaseModel, Batch, Decoder, Frozen, KvCache, LoadDtype, OpenOptions, TextModel,
    };
    pub use lorimer_serve::{Generation, Sampling, generate};
    pub use lorimer_train::{EncodeOptions, Evaluation, Example, Session, TrainSettings, evaluate};
}
