//! Low-rank adapters: the methods ([`methods`], one file each), adapters on a model ([`Adapter`], [`Attached`]),
//! adapter files ([`StoredAdapter`]), looking into, merging and converting them.

pub mod adapter;
pub mod algebra;
pub mod attached;
pub mod block;
pub mod delta;
pub mod dropout;
pub mod error;
pub mod example;
pub mod file;
pub mod gates;
pub mod method;
pub mod methods;
pub mod parameter;
pub mod part;
pub mod pruning;
pub mod router;
pub mod row_rate;
pub mod settings;
pub mod step;
pub mod targets;
pub mod training;
pub mod unit;

pub use adapter::Adapter;
pub use attached::Attached;
pub use block::{BlockDelta, BlockSite};
pub use delta::{Change, Delta, GatedLowRank, LowRank, NotMergeable};
pub use error::{Error, Result};
pub use file::account::{Accounting, FileAccount};
pub use file::frozen::FrozenParts;
pub use file::keys::FileKeys;
pub use file::store::{Golden, Manifest, StoredAdapter};
pub use gates::Gates;
pub use method::{Calibration, CalibrationStats, Method};
pub use parameter::{Named, Parameter, Role};
pub use part::Part;
pub use pruning::{BaseIdentity, Pruning};
pub use router::{Router, Routes};
pub use step::{SampledRank, Step};
pub use training::Training;
pub use unit::{RouteMeter, RouteTotals, UnitRoute, UnitRouter};
