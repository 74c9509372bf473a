//! Low-rank adapters: the methods ([`methods`], one file each), adapters on a model ([`Adapter`], [`Attached`]),
//! adapter files ([`StoredAdapter`]), looking into, merging and converting them.

pub mod attached;
pub mod card;
pub mod convert;
pub mod error;
pub mod example;
pub mod export;
pub mod frozen;
pub mod inspect;
pub mod merge;
pub mod method;
pub mod methods;
pub mod resize;
pub mod store;
pub mod switch;
pub mod targets;
pub mod training;

pub use attached::{Accounting, Adapter, Attached};
pub use error::{Error, Result};
pub use frozen::FrozenParts;
pub use method::{Calibration, Change, Delta, Findings, LowRank, Method, NotMergeable, SampledRank, Step};
pub use store::{BaseIdentity, Golden, Manifest, StoredAdapter};
pub use training::Training;
