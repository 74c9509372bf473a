//! Serving: the engine against plain generation, its scheduler, the store of adapters.

mod prelude;
#[path = "../../../../tests/support/tiny.rs"]
mod tiny;

mod blocks;
mod capabilities;
mod draft;
mod eight_bits;
mod engine;
mod families;
mod memory;
mod progress;
mod requests;
mod shapes;
mod store;
mod units;
