//! `lorimer pull`

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use lorimer::model::pull::{PullOptions, pull};
use serde_json::json;

use lorimer_cli::{Global, common};

/// Fetch a base model into the cache that Python's huggingface_hub shares
#[derive(Args)]
pub struct Pull {
    /// Alias (smollm2-135m, minilm), hub id (owner/name or owner/name@revision), folder or .gguf file
    #[arg(default_value = "smollm2-135m")]
    model: String,
}

impl Pull {
    pub fn run(self, global: Global) -> Result<ExitCode> {
        let pulled = pull(&self.model, PullOptions { refresh: true, progress: common::draws(global) })?;
        let (config, _) = lorimer::model::base::open_weights(&pulled.path, Default::default())?;
        let config = config.shape();
        let json = json!({
            "model": pulled.name, "path": pulled.path, "source": pulled.source, "model_type": config.model_type,
            "layers": config.layers.len(), "hidden_size": config.hidden, "vocab_size": config.vocabulary,
        });
        common::print(global, &json, || {
            format!(
                "{} ({}, {} layers of {}) is at {} [{}]",
                pulled.name,
                config.model_type,
                config.layers.len(),
                config.hidden,
                pulled.path.display(),
                pulled.source
            )
        })
    }
}
