//! The names that most tests need.

pub use lorimer_adapter::{Adapter, Attached, Delta, Method, Step, StoredAdapter, methods};
pub use lorimer_model::{Adaptation, BaseModel, Batch, Decoder, Frozen, KvCache, LoadDtype, TextModel};
pub use lorimer_serve::Sampling;
pub use lorimer_train::Example;
