//! The adapters that a server has: their names and files, where those come from, and each as the engine serves it.

pub mod found;
pub mod hosted;
pub mod hub;
pub mod mirror;
pub mod names;
pub mod registry;
pub mod replay;
pub mod store;
