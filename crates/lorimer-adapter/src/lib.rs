//! Low-rank adapters: the methods ([`methods`], one file each), adapters on a model ([`Adapter`], [`Attached`]),
//! adapter files ([`StoredAdapter`]), looking into, merging and converting them.

pub mod adapter;
pub mod algebra;
pub mod attached;
pub mod error;
pub mod example;
pub mod file;
pub mod method;
pub mod methods;
pub mod search;
pub mod settings;
pub mod targets;
pub mod training;

pub use adapter::Adapter;
pub use attached::Attached;
pub use error::{Error, Result};
pub use file::account::{Accounting, FileAccount};
pub use file::frozen::FrozenParts;
pub use file::keys::FileKeys;
pub use file::store::{BaseIdentity, Golden, Manifest, StoredAdapter};
pub use method::{
    Calibration, CalibrationStats, Change, Delta, GatedLowRank, LowRank, Method, NotMergeable, SampledRank, Step,
};
pub use training::Training;
