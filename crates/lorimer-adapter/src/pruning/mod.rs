//! Taking whole units out of a decoder's layers: what a unit is, which are kept, and the record of it beside a smaller model.

pub mod origin;
pub mod record;
pub mod units;

pub use origin::{BaseIdentity, PrunedFrom};
pub use record::{BaseRecord, PRUNING_FILE, Pruning, check_parts, check_record, record_beside};
pub use units::{Axis, KeptLayer, Kind, Span, spans};
