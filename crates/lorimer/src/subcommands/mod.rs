//! The subcommands, one file each; `bench` and `compare` are in `lorimer-bench`.

pub mod check;
pub mod convert;
pub mod embed;
pub mod eval;
pub mod extract;
pub mod federate;
pub mod generate;
pub mod inspect;
pub mod merge;
pub mod methods;
pub mod plan;
pub mod prune;
pub mod pull;
pub mod quantize;
pub mod quickstart;
pub mod recover;
pub mod resize;
pub mod serve;
pub mod switch;
pub mod train;
