//! `lorimer resize`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;
use lorimer::adapter::algebra::resize::resize;
use lorimer::adapter::file::load::account_of;
use lorimer::adapter::{Manifest, StoredAdapter};
use serde_json::json;

use lorimer_cli::{Global, common};

/// Cut a LoRA to its first ranks, byte for byte: every rank of a `dylora` training is an adapter. For the nearest LoRA of a rank use
/// `lorimer convert --to lora --rank`
#[derive(Args)]
pub struct Resize {
    /// Adapter folder
    adapter: PathBuf,
    /// The rank that is left
    #[arg(long, short)]
    rank: usize,
    /// Where to write
    #[arg(long, short)]
    output: PathBuf,
}

impl Resize {
    pub fn run(self, global: Global) -> Result<ExitCode> {
        if self.output.exists() {
            bail!("`{}` exists; choose another --output", self.output.display());
        }
        let stored = StoredAdapter::read(&self.adapter)?;
        let mut cut = resize(&stored, self.rank)?;
        let before = stored.manifest.as_ref();
        cut.manifest = Some(Manifest {
            format: 1,
            content_id: cut.content_id()?,
            method: before.map_or("lora", |m| m.method.as_str()).to_string(),
            lorimer: env!("CARGO_PKG_VERSION").to_string(),
            base: before.and_then(|m| m.base.clone()),
            chat_template: before.and_then(|m| m.chat_template.clone()),
            training: json!({
                "resized_from": before.map(|m| &m.content_id), "rank": self.rank,
                "method_settings": before.map(|m| &m.training["method_settings"]),
            }),
            golden: Vec::new(),
            frozen: Default::default(),
            xlora: None,
        });
        cut.write(&self.output, None)?;
        let modules = account_of(&cut)?.1.modules.len();
        let json = json!({ "output": self.output, "rank": self.rank, "modules": modules });
        common::print(global, &json, || {
            format!("wrote {modules} modules of rank {} to {}", self.rank, self.output.display())
        })
    }
}
