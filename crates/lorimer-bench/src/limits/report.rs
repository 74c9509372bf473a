//! What `lorimer limits` prints as JSON.

use serde::Serialize;

/// One head.
#[derive(Debug, Serialize)]
pub struct HeadReport {
    /// Its number in the layer.
    pub head: usize,
    /// ‖Q‖∞: the largest absolute entry of its queries, rotated.
    pub q: f64,
    /// ‖K‖∞ of its keys, rotated.
    pub k: f64,
    /// ‖V‖∞ of its values.
    pub v: f64,
    /// ‖s X B A‖∞ of queries, before rotation; 0 without an adapter.
    pub q_change: f64,
    /// The same of keys.
    pub k_change: f64,
    /// Γ = max(‖Q‖∞, ‖K‖∞) over √(ln L).
    pub gamma_over_root: f64,
    /// τ: the largest |β q·k| among pairs that are seen.
    pub tau: f64,
    /// The same with the mean key subtracted from all.
    pub tau_centred: f64,
    /// The least degree g for the tolerance with centred keys; null where none up to 256 will do.
    pub degree: Option<usize>,
    /// k = C(d + g, g); null where that is above 2^64.
    pub features: Option<u64>,
    /// Multiplications of the exact backward.
    pub exact_operations: f64,
    /// Those of the chained one.
    pub chained_operations: Option<f64>,
}

/// One layer.
#[derive(Debug, Serialize)]
pub struct LayerReport {
    /// Counted from 0.
    pub layer: usize,
    /// All of its heads.
    pub heads: Vec<HeadReport>,
}

/// One length.
#[derive(Debug, Serialize)]
pub struct LengthReport {
    /// L, in tokens.
    pub length: usize,
    /// √(ln L).
    pub root: f64,
    /// Of the base.
    pub base: Vec<LayerReport>,
    /// Of the base with its adapters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapted: Option<Vec<LayerReport>>,
}

/// What was measured.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The base's name.
    pub model: String,
    /// The adapters' folders.
    pub adapters: Vec<String>,
    /// What degrees were chosen for.
    pub tolerance: f64,
    /// One report a length.
    pub lengths: Vec<LengthReport>,
}
