//! Traces of requests: whose they are (W3C Trace Context), and their spans on the way to a collector (OTLP over HTTP). Nothing here knows a request.

pub mod context;
pub mod exporter;
mod otlp;
pub mod settings;
pub mod span;

pub use context::Parent;
pub use exporter::Exporter;
pub use settings::TraceSettings;
pub use span::{Span, Value};
