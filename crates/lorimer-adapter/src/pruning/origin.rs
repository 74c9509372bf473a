//! What an adapter says of the base that it was trained on.

use serde::{Deserialize, Serialize};

/// In `lorimer.json`, of an adapter that was trained on a smaller model: which, and of which base it is a part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrunedFrom {
    /// The id of its `pruning.json`.
    pub pruning: String,
    /// Hub id or path of the whole base.
    pub name: String,
    /// `sha256:…` over the whole base's weights.
    pub fingerprint: String,
    /// Query heads, key-value heads and channels of each layer of the smaller model.
    pub layers: Vec<[usize; 3]>,
}

/// Which base an adapter belongs to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BaseIdentity {
    /// Hub id or path.
    pub name: String,
    /// `sha256:…` over the weights (see `Weights::fingerprint`).
    pub fingerprint: String,
    /// `llama`, `qwen2` …
    pub model_type: String,
    /// Of a base that is a pruned model with its `pruning.json`: which, and the whole base that it is a part of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pruned: Option<PrunedFrom>,
}
