//! Training against its own laws, and against the numbers of PEFT, torch and the authors of methods.

mod prelude;
#[path = "../../../../tests/support/goldens.rs"]
mod support;
#[path = "../../../../tests/support/tiny.rs"]
mod tiny;

mod authors;
mod dynamics;
mod goldens;
mod grouped;
mod llava_mole;
mod low_rank;
mod pruning;
mod quantize;
mod reproductions;
mod search;
