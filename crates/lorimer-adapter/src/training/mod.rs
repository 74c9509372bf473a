//! How an adapter is trained, where that is more than AdamW on the loss of its task: optimisers, callbacks and auxiliary losses, each with its
//! settings. A method brings them by [`crate::Method::training`], and its file has their mathematics; the loop that drives them is in
//! `lorimer-train`.

use std::sync::Arc;

pub mod adamw;
pub mod callback;
pub mod objective;
pub mod optimizer;
pub mod search;

pub use adamw::{Adam, AdamW};
pub use callback::{Callback, CallbackKind, RunShape};
pub use objective::{Moment, Objective, ObjectiveKind};
pub use optimizer::{AdamWConfig, Module, Optimizer, OptimizerKind, ParamGroup};

/// What a method's name stands for beside its form.
#[derive(Clone, Debug, Default)]
pub struct Training {
    /// From gradients to steps; None: AdamW.
    pub optimizer: Option<Arc<dyn OptimizerKind>>,
    /// What acts between the parts of a step.
    pub callback: Option<Arc<dyn CallbackKind>>,
    /// What is minimised beside the loss of the task.
    pub objective: Option<Arc<dyn ObjectiveKind>>,
    /// What the balance of the blocks' routes is multiplied by ([`crate::RouteMeter`]), its mean over samples added to the loss.
    pub router_balance: f64,
}
