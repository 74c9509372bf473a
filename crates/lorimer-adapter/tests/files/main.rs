//! Adapter files, and methods against the numbers of PEFT and of their authors.

#[path = "../../../../tests/support/goldens.rs"]
mod goldens;
mod prelude;

mod account;
mod combine;
mod gated;
mod methods;
mod peft;
mod sparse_gin;
