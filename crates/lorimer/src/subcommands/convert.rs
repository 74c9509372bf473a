//! `lorimer convert`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, anyhow, bail};
use clap::{Args, ValueEnum};
use lorimer::adapter::file::convert;
use lorimer::adapter::file::dialects::{DIFFUSERS, KOHYA, mlx};
use lorimer::adapter::file::export::{Exported, FixedGates, to_lora, to_lora_with_gates};
use lorimer::adapter::file::load::account_of;
use lorimer::adapter::file::store::WEIGHTS_FILE;
use lorimer::adapter::gates::{Gated, gated_by};
use lorimer::adapter::methods::shira::{Form, reform};
use lorimer::adapter::{Adapter, Attached, Gates, Manifest, StoredAdapter};
use lorimer::model::Base;
use lorimer::model::base::open_weights;
use lorimer::model::decoder::config::DecoderConfig;
use lorimer::model::pull::{PullOptions, Pulled, pull};
use lorimer::train::{EncodeOptions, evaluate};
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

/// What takes the place of gates.
#[derive(Clone, Debug, PartialEq)]
enum GatesFlag {
    Mean,
    Uniform,
    Numbers(Vec<f64>),
}

impl std::str::FromStr for GatesFlag {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let number = |part: &str| part.trim().parse::<f64>().ok().filter(|v| v.is_finite());
        match text {
            "mean" => Ok(Self::Mean),
            "uniform" => Ok(Self::Uniform),
            _ => text.split(',').map(number).collect::<Option<_>>().map(Self::Numbers).ok_or_else(|| {
                "should be `mean`, `uniform`, or a finite number for each expert, separated by commas".into()
            }),
        }
    }
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

/// Writes an adapter that was made a LoRA, and tells how near it is.
pub fn write_lora(
    (mut lora, exported): (StoredAdapter, Exported),
    before: Option<&Manifest>,
    from: &str,
    output: &Path,
    global: Global,
) -> Result<ExitCode> {
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
    /// With --to lora, of an adapter whose gates depend on the token (xlora, llava-mole, smora, flylora): what takes their place. `mean`: their means
    /// over --data, projection by projection; `uniform`: 1/n for each of n experts; or a number an expert, separated by commas
    #[arg(long, value_name = "mean|uniform|NUMBERS", allow_hyphen_values = true)]
    gates: Option<GatesFlag>,
    /// With --gates: rows that the means are taken over, and on which both adapters' losses are compared
    #[arg(long, value_name = "FILE", requires = "gates")]
    data: Option<PathBuf>,
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
        let exported = match &self.gates {
            Some(gates) => return self.with_gates((&base, &pulled), (&adapter, stored), (gates, &from), global),
            None => to_lora(base.model(), &adapter, self.rank, &pulled.name),
        };
        let exported = exported.map_err(|error| match gated_by(base.model(), &adapter) {
            Ok(_) => anyhow!("{error}; --gates writes it with fixed gates in their place"),
            Err(_) => error.into(),
        })?;
        write_lora(exported, stored.manifest.as_ref(), &from, &self.output, global)
    }

    /// Writes an adapter with fixed gates, and compares its loss on the rows with that of the adapter.
    fn with_gates(
        &self,
        (base, pulled): (&Base, &Pulled),
        (adapter, stored): (&Adapter, &StoredAdapter),
        (gates, from): (&GatesFlag, &str),
        global: Global,
    ) -> Result<ExitCode> {
        let model = base.model();
        let (of, count) = gated_by(model, adapter)?;
        let examples = match &self.data {
            Some(data) => common::load_data(data, &base.text, &EncodeOptions::default())?.0,
            None if *gates == GatesFlag::Mean => bail!("--gates mean takes the means over rows; give them with --data"),
            None => Vec::new(),
        };
        let tokens = || examples.iter().map(|e| e.tokens.as_slice());
        let means = match gates {
            GatesFlag::Mean => Some(Gates::over(model, adapter, tokens())?),
            _ => None,
        };
        let numbers = match gates {
            GatesFlag::Mean => Vec::new(),
            GatesFlag::Uniform if of == Gated::Experts => vec![1.0 / count as f64; count],
            GatesFlag::Uniform => bail!(
                "the gates of a `{}` adapter are those of its ranks, of which --gates uniform knows nothing; --gates mean --data FILE takes their means, `lorimer merge --method dense` takes all ranks as acting",
                adapter.method.name()
            ),
            GatesFlag::Numbers(numbers) => numbers.clone(),
        };
        let fixed = means.as_ref().map_or(FixedGates::Experts(&numbers), FixedGates::Means);
        let (mut lora, exported) = to_lora_with_gates(model, adapter, fixed, &pulled.name)?;
        let mut own = manifest(&lora, from)?;
        if let Some(before) = &stored.manifest {
            (own.base, own.chat_template) = (before.base.clone(), before.chat_template.clone());
        }
        let parts: Vec<&str> = stored.parts.iter().map(|part| part.content_id.as_str()).collect();
        let told = match &means {
            Some(means) => json!({ "mean": { "rows": examples.len(), "tokens": means.rows } }),
            None => json!(numbers),
        };
        own.training["content_id"] = json!(stored.content_id()?);
        own.training["parts"] = json!(parts);
        own.training["gates"] = told;
        lora.manifest = Some(own);
        let losses = match examples.is_empty() {
            true => None,
            false => {
                let alone = Adapter::load_whole(model, &lora)?;
                let loss = |adapter: &Adapter| -> Result<f64> {
                    Ok(evaluate(model, &base.text, &Attached::one(adapter), &examples, &[], |_| {})?.loss)
                };
                Some((loss(adapter)?, loss(&alone)?))
            }
        };
        lora.write(&self.output, None)?;
        let mut json = serde_json::to_value(&exported)?;
        json["output"] = json!(self.output);
        json["gates"] = means.as_ref().map_or(json!(numbers), |means| json!(means));
        json["loss"] = losses.map_or(json!(null), |(before, after)| json!({ "adapter": before, "fixed": after }));
        common::print(global, &json, || {
            let (modules, rank, output) = (exported.modules, exported.rank, self.output.display());
            let mut out = format!("wrote {modules} modules of rank up to {rank} to {output}, with fixed gates");
            if let Some((before, after)) = losses {
                let rows = examples.len();
                out += &format!(
                    "\nloss of {rows} rows: {before:.4} with the adapter, {after:.4} with fixed gates ({:+.4})",
                    after - before
                );
            }
            out
        })
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
        if self.gates.is_some() && (self.to != Target::Lora || self.rank.is_some()) {
            bail!(
                "--gates is for --to lora, whose ranks are then those of the experts; `lorimer merge FOLDER --method svd --rank N` makes fewer of them"
            );
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
