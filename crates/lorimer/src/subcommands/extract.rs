//! `lorimer extract`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use candle_core::Tensor;
use clap::Args;
use lorimer::adapter::file::export::to_lora;
use lorimer::adapter::file::store::CONFIG_FILE;
use lorimer::adapter::{Adapter, StoredAdapter, methods};
use serde_json::Map;

use crate::subcommands::convert::write_lora;
use lorimer_cli::common::{DtypeFlag, ModelArgs};
use lorimer_cli::{Global, common};

/// The nearest LoRA of a full tune: of an adapter folder of `--method full` or `galore`, or of a whole tuned model beside its base
#[derive(Args)]
pub struct Extract {
    /// Adapter folder, or a tuned model (folder, .gguf file, hub id)
    tuned: String,
    /// Largest rank of a module
    #[arg(long, short, default_value_t = 64)]
    rank: usize,
    /// Which projections of a tuned model: all-linear, a list or a pattern
    #[arg(long, default_value = "all-linear")]
    target_modules: String,
    /// Where to write the LoRA
    #[arg(long, short)]
    output: PathBuf,
    #[command(flatten)]
    model: ModelArgs,
}

impl Extract {
    pub fn run(self, global: Global) -> Result<ExitCode> {
        if self.output.exists() {
            bail!("`{}` exists; choose another --output", self.output.display());
        }
        if self.rank == 0 {
            bail!("--rank should be at least 1");
        }
        let folder = PathBuf::from(&self.tuned);
        let (base, pulled) = common::open_base(&self.model, global)?;
        if folder.join(CONFIG_FILE).exists() {
            let stored = StoredAdapter::read(&folder)?;
            let adapter = common::attach(&base, &stored)?;
            let exported = to_lora(base.model(), &adapter, Some(self.rank), &pulled.name)?;
            return write_lora(exported, stored.manifest.as_ref(), &self.tuned, &self.output, global);
        }
        let own = ModelArgs { model: self.tuned.clone(), dtype: DtypeFlag::F32, tokenizer: None };
        let (tuned, _) = common::open_base(&own, global)?;
        let mut settings = Map::new();
        settings.insert("target_modules".into(), lorimer_cli::flags::names(&self.target_modules));
        let adapter = Adapter::attach(base.model(), methods::build("full", &settings)?, 0)?;
        let theirs = tuned.model().projections();
        for (path, delta) in adapter.deltas() {
            let found = theirs.iter().find(|(site, _)| site.path == path);
            let Some((_, projection)) = found else {
                bail!("`{}` has no `{path}`: it is another architecture", self.tuned)
            };
            for (_, var) in delta.trainable() {
                let weight: Tensor = projection.dense(var.dtype())?;
                if weight.dims() != var.dims() {
                    bail!(
                        "`{path}` is {:?} in `{}` and {:?} in the base: they are not of one architecture",
                        weight.dims(),
                        self.tuned,
                        var.dims()
                    );
                }
                var.set(&weight)?;
            }
        }
        if !adapter.has_effect(base.model())? {
            bail!("`{}` equals the base in every targeted projection; there is nothing to extract", self.tuned);
        }
        let exported = to_lora(base.model(), &adapter, Some(self.rank), &pulled.name)?;
        write_lora(exported, None, &self.tuned, &self.output, global)
    }
}
