//! `lorimer convert`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use lorimer::adapter::convert;
use lorimer::adapter::{Manifest, StoredAdapter};
use lorimer::model::base::open_weights;
use lorimer::model::config::LlamaConfig;
use lorimer::model::pull::{PullOptions, pull};
use serde_json::json;

use crate::{Global, common};

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Target {
    /// Folder with adapter_config.json and adapter_model.safetensors
    Peft,
    /// llama.cpp adapter
    Gguf,
    /// One safetensors file with lora_down, lora_up and alpha
    Kohya,
}

/// Convert an adapter between PEFT folders, llama.cpp GGUF adapters and kohya-style files
#[derive(Args)]
pub struct Convert {
    /// PEFT folder, .gguf adapter, or .safetensors file with kohya-style keys
    input: PathBuf,
    /// What to write
    #[arg(long, value_enum)]
    to: Target,
    /// Where to write: a folder for peft, a file otherwise
    #[arg(long, short)]
    output: PathBuf,
    /// Base of the adapter; its shape is needed to and from GGUF
    #[arg(long, short, default_value = "smollm2-135m")]
    model: String,
}

impl Convert {
    fn config(&self, global: Global) -> Result<LlamaConfig> {
        let pulled = pull(&self.model, PullOptions { refresh: false, progress: common::draws(global) })?;
        Ok(open_weights(&pulled.path, Default::default())?.0)
    }

    pub fn run(self, global: Global) -> Result<ExitCode> {
        let extension = |p: &Path, e: &str| p.extension().is_some_and(|x| x == e);
        if self.output.exists() {
            bail!("`{}` exists; choose another --output", self.output.display());
        }
        let adapter = if extension(&self.input, "gguf") {
            convert::to_peft(convert::read_gguf(&self.input, &self.config(global)?)?, &self.model)?
        } else if extension(&self.input, "safetensors") {
            convert::to_peft(convert::read_kohya(&self.input)?, &self.model)?
        } else {
            StoredAdapter::read(&self.input)?
        };
        let modules = adapter.modules().len();
        match self.to {
            Target::Gguf => convert::write_gguf(&adapter, &self.config(global)?, &self.output)?,
            Target::Kohya => convert::write_kohya(&adapter, &self.output)?,
            Target::Peft => {
                let mut adapter = adapter;
                let id = adapter.content_id()?;
                let method = lorimer::adapter::methods::from_adapter_config(&adapter.config)?.name().to_string();
                adapter.manifest.get_or_insert_with(|| Manifest {
                    format: 1,
                    content_id: id,
                    method,
                    lorimer: env!("CARGO_PKG_VERSION").to_string(),
                    base: None,
                    chat_template: None,
                    training: json!({ "converted_from": self.input.file_name().map(|n| n.to_string_lossy()) }),
                    golden: Vec::new(),
                    frozen: Default::default(),
                });
                adapter.write(&self.output, None)?;
            }
        }
        let json = json!({ "output": self.output, "modules": modules });
        common::print(global, &json, || format!("wrote {} modules to {}", modules, self.output.display()))
    }
}
