//! How LoRA's factors may begin.

use serde_json::Value;

use crate::error::{Error, Result};

/// How A and B begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    Default,
    Gaussian,
    Orthogonal,
    Pissa(Option<usize>),
    Olora,
    Eva,
}

impl Start {
    pub(crate) fn parse(value: &Value) -> Result<Self> {
        let unknown = || {
            let shown: String = value.to_string().chars().take(40).collect();
            Error::Config(format!(
                "init_lora_weights {shown} is not one of true, gaussian, orthogonal, pissa, pissa_niter_N, olora, eva"
            ))
        };
        match value {
            Value::Bool(_) | Value::Null => Ok(Self::Default),
            Value::String(s) => match s.to_lowercase().as_str() {
                "true" | "default" => Ok(Self::Default),
                "gaussian" => Ok(Self::Gaussian),
                "orthogonal" => Ok(Self::Orthogonal),
                "olora" => Ok(Self::Olora),
                "eva" => Ok(Self::Eva),
                "pissa" => Ok(Self::Pissa(None)),
                other => match other.strip_prefix("pissa_niter_").and_then(|n| n.parse().ok()) {
                    Some(n) if n <= 1000 => Ok(Self::Pissa(Some(n))),
                    _ => Err(unknown()),
                },
            },
            _ => Err(unknown()),
        }
    }

    /// Whether B₀A₀ ≠ 0, so that the residual of the base is what is adapted.
    pub(crate) fn moves_base(self) -> bool {
        matches!(self, Self::Pissa(_) | Self::Olora)
    }
}
