//! The names that most tests need.

pub use lorimer_adapter::{Adapter, Attached, Delta, Method, Step, StoredAdapter, methods};
pub use lorimer_model::{Adaptation, BaseModel, Batch, Frozen, LoadDtype, TextModel};
pub use lorimer_train::{Example, TrainSettings};
