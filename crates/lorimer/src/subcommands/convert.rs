//! `lorimer convert`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use lorimer::adapter::file::convert;
use lorimer::adapter::file::dialects::{DIFFUSERS, KOHYA, mlx};
use lorimer::adapter::file::export::to_lora;
use lorimer::adapter::file::load::account_of;
use lorimer::adapter::file::store::WEIGHTS_FILE;
use lorimer::adapter::methods::shira::{Form, reform};
use lorimer::adapter::{Adapter, Manifest, StoredAdapter};
use lorimer::model::Base;
use lorimer::model::base::open_weights;
use lorimer::model::decoder::config::DecoderConfig;
use lorimer::model::pull::{PullOptions, Pulled, pull};
use serde_json::json;

use lorimer_cli::common::ModelArgs;
use lorimer_cli::{Global, common};

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Target {
    /// Folder with adapter_config.json and adapter_model.safetensors
    Peft,
    /// The same, of any method as a plain LoRA: exact where its mathematics allows, else the nearest of --rank, with the error told
    Lora,
    /// A sparse adapter (shira) in 5 bytes an entry in place of PEFT's 12; `--to peft` changes back
    Compact,
    /// The same with values in f16: 3 bytes an entry
    CompactF16,
    /// llama.cpp adapter
    Gguf,
    /// One safetensors file with lora_down, lora_up and alpha
    Kohya,
    /// Folder for mlx-lm
    Mlx,
    /// One safetensors file with the names of a text encoder in diffusers
    Diffusers,
}

/// For a converted adapter.
fn manifest(adapter: &StoredAdapter, from: &str) -> Result<Manifest> {
    Ok(Manifest {
        format: 1,
        content_id: adapter.content_id()?,
        method: lorimer::adapter::methods::from_adapter_config(&adapter.config)?.name().to_string(),
        lorimer: env!("CARGO_PKG_VERSION").to_string(),
        base: None,
        chat_template: None,
        training: json!({ "converted_from": from }),
        golden: Vec::new(),
        frozen: Default::default(),
        xlora: None,
    })
}

/// Writes an adapter as the nearest LoRA, and tells how near that is.
pub fn write_lora(
    base: &Base,
    pulled: &Pulled,
    (adapter, before): (&Adapter, Option<&Manifest>),
    from: &str,
    rank: Option<usize>,
    output: &Path,
    global: Global,
) -> Result<ExitCode> {
    let (mut lora, exported) = to_lora(base.model(), adapter, rank, &pulled.name)?;
    let mut manifest = manifest(&lora, from)?;
    if let Some(before) = before {
        (manifest.base, manifest.chat_template) = (before.base.clone(), before.chat_template.clone());
        // An exact export answers as the adapter does.
        if exported.exact == exported.modules {
            manifest.golden = before.golden.clone();
        }
    }
    lora.manifest = Some(manifest);
    lora.write(output, None)?;
    let mut json = serde_json::to_value(&exported)?;
    json["output"] = json!(output);
    common::print(global, &json, || {
        let how = match exported.exact == exported.modules {
            true => "exact".to_string(),
            false => format!(
                "{} of them exact, error of the others {:.2} % of the change",
                exported.exact,
                100.0 * exported.error
            ),
        };
        format!("wrote {} modules of rank up to {} to {}: {how}", exported.modules, exported.rank, output.display())
    })
}

/// Convert an adapter between PEFT folders, llama.cpp GGUF adapters, mlx-lm folders and files of kohya and diffusers, or any method's to a plain LoRA
#[derive(Args)]
pub struct Convert {
    /// PEFT folder, .gguf adapter, mlx-lm folder, or .safetensors file with names of kohya or diffusers
    input: PathBuf,
    /// What to write
    #[arg(long, value_enum)]
    to: Target,
    /// With --to lora: the largest rank [default: exact ones as they are, 64 for the others]
    #[arg(long)]
    rank: Option<usize>,
    /// Where to write: a folder for peft, lora, compact and mlx, a file otherwise
    #[arg(long, short)]
    output: PathBuf,
    #[command(flatten)]
    model: ModelArgs,
}

impl Convert {
    fn config(&self, global: Global) -> Result<DecoderConfig> {
        let pulled = pull(&self.model.model, PullOptions { refresh: false, progress: common::draws(global) })?;
        Ok(open_weights(&pulled.path, Default::default())?.0.decoder("llama.cpp's adapters")?.clone())
    }

    fn to_lora(&self, stored: &StoredAdapter, global: Global) -> Result<ExitCode> {
        let (base, pulled) = common::open_base(&self.model, global)?;
        let adapter = common::attach(&base, stored)?;
        let from = self.input.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        write_lora(&base, &pulled, (&adapter, stored.manifest.as_ref()), &from, self.rank, &self.output, global)
    }

    pub fn run(self, global: Global) -> Result<ExitCode> {
        let extension = |p: &Path, e: &str| p.extension().is_some_and(|x| x == e);
        if self.output.exists() {
            bail!("`{}` exists; choose another --output", self.output.display());
        }
        let adapter = if extension(&self.input, "gguf") {
            convert::to_peft(convert::read_gguf(&self.input, &self.config(global)?)?, &self.model.model)?
        } else if extension(&self.input, "safetensors") {
            convert::to_peft(convert::read_safetensors(&self.input)?, &self.model.model)?
        } else if !self.input.join(WEIGHTS_FILE).exists() && self.input.join(mlx::WEIGHTS_FILE).is_file() {
            convert::to_peft(convert::read_safetensors(&self.input.join(mlx::WEIGHTS_FILE))?, &self.model.model)?
        } else {
            StoredAdapter::read(&self.input)?
        };
        if self.rank.is_some_and(|rank| rank == 0) || (self.rank.is_some() && self.to != Target::Lora) {
            bail!("--rank should be at least 1, and is for --to lora");
        }
        let modules = account_of(&adapter)?.1.modules.len();
        match self.to {
            Target::Lora => return self.to_lora(&adapter, global),
            Target::Compact => reform(&adapter, Form::Compact)?.write(&self.output, None)?,
            Target::CompactF16 => reform(&adapter, Form::CompactF16)?.write(&self.output, None)?,
            Target::Peft if adapter.config.get("form").is_some_and(|f| f != "peft") => {
                reform(&adapter, Form::Peft)?.write(&self.output, None)?;
            }
            Target::Gguf => convert::write_gguf(&adapter, &self.config(global)?, &self.output)?,
            Target::Kohya => convert::write_safetensors(&adapter, &KOHYA, &self.output)?,
            Target::Mlx => convert::write_mlx(&adapter, &self.output)?,
            Target::Diffusers => convert::write_safetensors(&adapter, &DIFFUSERS, &self.output)?,
            Target::Peft => {
                let mut adapter = adapter;
                if adapter.manifest.is_none() {
                    let from = self.input.file_name().map(|n| n.to_string_lossy().into_owned());
                    adapter.manifest = Some(manifest(&adapter, &from.unwrap_or_default())?);
                }
                adapter.write(&self.output, None)?;
            }
        }
        let json = json!({ "output": self.output, "modules": modules });
        common::print(global, &json, || format!("wrote {} modules to {}", modules, self.output.display()))
    }
}
