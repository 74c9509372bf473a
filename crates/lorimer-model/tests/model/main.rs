//! Base models against what transformers computes and reads.

#[path = "../../../../tests/support/goldens.rs"]
mod support;

mod goldens;
