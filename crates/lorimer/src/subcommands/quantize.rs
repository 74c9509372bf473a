//! `lorimer quantize`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use lorimer::model::pull::own_cache;
use lorimer::model::{Base, OpenOptions};
use lorimer::train::data::Format as RowFormat;
use lorimer::train::quantize::{
    CalibrationData, Format, Grid, Groups, Method, ModuleConfig, Quantize as Run, QuantizeSettings, Report, Stage,
};
use lorimer::train::{EncodeOptions, TooLong};

use lorimer_cli::common::{DtypeFlag, ModelArgs};
use lorimer_cli::flags::show_bytes;
use lorimer_cli::{Global, common};

#[derive(Clone, Copy, ValueEnum)]
enum MethodFlag {
    /// Bits of each matrix under one budget, and an adapter that begins as the best repair
    LqLora,
    /// One number of bits, and an adapter that begins as a repair
    Loftq,
    /// One number of bits, no adapter
    Nf,
    /// 4 bits in groups, for --format gptq and awq: each weight rounded to the nearest
    Rtn,
    /// 4 bits in groups, for --format gptq and awq: rounded so that outputs change least on the rows of --calibration
    Gptq,
}

#[derive(Clone, Copy, ValueEnum)]
enum GridFlag {
    /// 13 configurations
    Small,
    /// The paper's 432: many hours on a small machine
    Paper,
}

#[derive(Clone, Copy, ValueEnum)]
enum FormatFlag {
    /// Lorimer's own: NormalFloat of 2, 3, 4 or 8 bits, of each matrix its own
    LorimerNf,
    /// bitsandbytes' NF4 with double quantisation, which transformers loads; with --method nf --bits 4
    Bitsandbytes,
    /// GPTQ's 4 bits, which transformers loads with gptqmodel; with --method rtn or gptq
    Gptq,
    /// AWQ's 4 bits (gemm), which transformers loads with gptqmodel; with --method rtn or gptq
    Awq,
}

/// Put a base into 2 to 8 bits a weight, with an adapter that begins as its repair. A run that was interrupted goes on with the same
/// command
#[derive(Args)]
pub struct Quantize {
    /// Base model: an alias (smollm2-135m), a Hugging Face hub id, a folder or a .gguf file
    #[arg(long, short, default_value = "smollm2-135m")]
    model: String,
    /// How
    #[arg(long, value_enum, default_value = "lq-lora")]
    method: MethodFlag,
    /// Bits a weight: a budget for lq-lora (2.75), 4 for rtn and gptq, 2, 3, 4 or 8 otherwise [default: 3; 4 with rtn and gptq]
    #[arg(long)]
    bits: Option<f64>,
    /// Inputs that share a scale and a zero point, with rtn and gptq; -1: all of a row [default: 128]
    #[arg(long, allow_negative_numbers = true)]
    group_size: Option<i64>,
    /// With --format gptq: a zero point for each group in the place of symmetric groups. AWQ's have them always
    #[arg(long)]
    asym: bool,
    /// Rank of the adapter, with lq-lora and loftq [default: 64]
    #[arg(long, short)]
    rank: Option<usize>,
    /// Alpha of the adapter, with lq-lora and loftq; its change is multiplied by alpha/rank [default: 16]
    #[arg(long)]
    alpha: Option<f64>,
    /// Rows whose gradients weight the error (Fisher information), with lq-lora or loftq
    #[arg(long, value_name = "FILE")]
    fisher: Option<PathBuf>,
    /// Rows on whose inputs gptq rounds
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// Most rows of --fisher or --calibration [default: 512, 128]
    #[arg(long)]
    samples: Option<usize>,
    /// Longest sequence of --fisher or --calibration in tokens [default: 1024]
    #[arg(long)]
    max_length: Option<usize>,
    /// Form of the rows of --fisher or --calibration: messages, alpaca, sharegpt, prompt-completion, text [default: told by the keys]
    #[arg(long)]
    data_format: Option<RowFormat>,
    /// Configurations that lq-lora chooses from [default: small]
    #[arg(long, value_enum)]
    grid: Option<GridFlag>,
    /// Most steps of a matrix's decomposition [default: 100 for lq-lora, 5 for loftq]
    #[arg(long)]
    steps: Option<usize>,
    /// Seed of the randomised SVD, with lq-lora and loftq [default: 0]
    #[arg(long)]
    seed: Option<u64>,
    /// How the weights are written [default: lorimer-nf; gptq with rtn and gptq]
    #[arg(long, value_enum)]
    format: Option<FormatFlag>,
    /// Folder to write: base, and adapter where there is one
    #[arg(long, short)]
    output: PathBuf,
    /// Also write the base expanded again, for transformers and PEFT
    #[arg(long, value_name = "FOLDER")]
    export_dense: Option<PathBuf>,
}

impl Quantize {
    fn settings(&self) -> Result<QuantizeSettings> {
        let method = match self.method {
            MethodFlag::LqLora => Method::LqLora,
            MethodFlag::Loftq => Method::Loftq,
            MethodFlag::Nf => Method::Nf,
            MethodFlag::Rtn => Method::Rtn,
            MethodFlag::Gptq => Method::Gptq,
        };
        let format = match self.format {
            Some(FormatFlag::LorimerNf) => Format::LorimerNf,
            Some(FormatFlag::Bitsandbytes) => Format::Bitsandbytes,
            Some(FormatFlag::Gptq) => Format::Gptq,
            Some(FormatFlag::Awq) => Format::Awq,
            None if method.has_groups() => Format::Gptq,
            None => Format::LorimerNf,
        };
        let size = match self.group_size {
            Some(-1) => None,
            Some(size) => match usize::try_from(size) {
                Ok(size) => Some(size),
                Err(_) => bail!("--group-size {size} should be a multiple of 8, or -1 for whole rows"),
            },
            None => Some(128),
        };
        let groups = Groups { size, symmetric: format == Format::Gptq && !self.asym };
        Ok(QuantizeSettings {
            method,
            bits: self.bits.unwrap_or(if method.has_groups() { 4.0 } else { 3.0 }),
            rank: self.rank.unwrap_or(if method.repairs() { 64 } else { 0 }),
            alpha: self.alpha.unwrap_or(16.0),
            grid: match self.grid {
                None | Some(GridFlag::Small) => Grid::Small,
                Some(GridFlag::Paper) => Grid::Paper,
            },
            steps: self.steps.unwrap_or(if method == Method::LqLora { 100 } else { 5 }),
            seed: self.seed.unwrap_or(0),
            format,
            groups: (method.has_groups() || self.group_size.is_some() || self.asym).then_some(groups),
        })
    }

    /// The file of the rows that the method looks at, and how many of them.
    fn rows(&self, method: Method) -> Result<Option<(&PathBuf, usize)>> {
        match (method, &self.fisher, &self.calibration) {
            (Method::Gptq, None, None) => bail!("`gptq` rounds by the inputs that rows give; pass --calibration FILE"),
            (Method::Gptq, None, Some(path)) => Ok(Some((path, self.samples.unwrap_or(128)))),
            (_, _, Some(_)) => bail!("--calibration goes with `--method gptq`; leave it out"),
            (_, Some(_), None) if !method.repairs() => {
                bail!("--fisher weights a low-rank change, which `{}` does not have; leave it out", method.name())
            }
            (_, Some(path), None) => Ok(Some((path, self.samples.unwrap_or(512)))),
            (_, None, None) => Ok(None),
        }
    }

    /// Refuses flags that the method has no use for.
    fn refuse_idle(&self, method: Method, rows: bool) -> Result<()> {
        let repairs = "a low-rank change, which only lq-lora and loftq make";
        let of_rows = "rows, which --fisher or --calibration gives";
        let idle = [
            ("--alpha", self.alpha.is_some() && !method.repairs(), repairs),
            ("--steps", self.steps.is_some() && !method.repairs(), repairs),
            ("--seed", self.seed.is_some() && !method.repairs(), repairs),
            (
                "--grid",
                self.grid.is_some() && method != Method::LqLora,
                "several configurations, which only lq-lora chooses from",
            ),
            ("--samples", self.samples.is_some() && !rows, of_rows),
            ("--max-length", self.max_length.is_some() && !rows, of_rows),
            ("--data-format", self.data_format.is_some() && !rows, of_rows),
        ];
        match idle.iter().find(|(_, idle, _)| *idle) {
            Some((flag, _, what)) => bail!("{flag} is of {what}; leave it out with `--method {}`", method.name()),
            None => Ok(()),
        }
    }

    pub fn run(self, global: Global) -> Result<ExitCode> {
        let settings = self.settings()?;
        settings.check()?;
        let rows_of = self.rows(settings.method)?;
        self.refuse_idle(settings.method, rows_of.is_some())?;
        if let Some(dense) = &self.export_dense
            && (dense.exists() || *dense == self.output)
        {
            bail!("`{}` exists or is --output; choose another --export-dense", dense.display());
        }
        let model = ModelArgs { model: self.model.clone(), dtype: DtypeFlag::F32, tokenizer: None };
        let (prepared, pulled) = common::prepare_base(&model, global)?;
        let rows = match rows_of {
            None => Vec::new(),
            Some((path, samples)) => {
                let options = EncodeOptions {
                    format: self.data_format,
                    max_length: self.max_length.unwrap_or(1024),
                    too_long: TooLong::Cut,
                    train_on_prompt: false,
                    skip_bad_rows: false,
                    limit: Some(samples),
                };
                common::load_data(path, &prepared.text, &options)?.0
            }
        };
        let base = match rows_of {
            Some(_) => Some(Base::open(&pulled.path, &OpenOptions::default())?),
            None => None,
        };
        let stop = common::stop_flag();
        let run = Run {
            config: &prepared.config,
            weights: &prepared.weights,
            text: &prepared.text,
            base_name: &pulled.name,
            settings,
            calibration: base.as_ref().map(|base| CalibrationData { base, rows: rows.iter().collect() }),
            output: &self.output,
            dense: self.export_dense.as_deref(),
            cache: Some(own_cache().join("quantize")),
            stop: &stop,
        };
        let Some(report) = run.run(progress(global))? else {
            return Ok(common::interrupted("interrupted; the same command goes on from there"));
        };
        common::print(global, &report, || text(&report))
    }
}

/// A bar on a terminal, else a line now and then.
fn progress(global: Global) -> impl FnMut(Stage, usize, usize) {
    let bar = common::bar(0, "{bar:24} {pos}/{len} {msg}  {eta} left", global);
    let mut now = None;
    move |stage, done, total| {
        let what = match stage {
            Stage::Fisher => "rows' gradients",
            Stage::Errors => "matrices under each configuration",
            Stage::Decompose => "matrices quantised",
        };
        if now != Some(stage) {
            bar.reset();
            bar.set_message(what);
            now = Some(stage);
        }
        bar.set_length(total as u64);
        bar.set_position(done as u64);
        if bar.is_hidden() && (done == total || done % (total / 10).max(1) == 0) {
            tracing::info!("{what}: {done} of {total}");
        }
    }
}

fn text(report: &Report) -> String {
    let mut out = format!(
        "model      {} ({} in {:.3} bits a weight)\n",
        report.output.display(),
        show_bytes(report.bytes),
        report.bits
    );
    // Matrices by configuration.
    let mut kinds: Vec<(String, usize, f64, f64)> = Vec::new();
    for m in &report.modules {
        let name = match &m.config {
            ModuleConfig::NormalFloat(c) => {
                format!("({}, {}, {}, {}, {})", c.num_bits, c.num_bits_0, c.num_bits_1, c.block_size_0, c.block_size_1)
            }
            ModuleConfig::Grouped(c) => format!("groups of {}", c.group_size),
        };
        match kinds.iter_mut().find(|kind| kind.0 == name) {
            Some(kind) => (kind.1, kind.2, kind.3) = (kind.1 + 1, kind.2 + m.bits, kind.3 + m.error),
            None => kinds.push((name, 1, m.bits, m.error)),
        }
    }
    kinds.sort_by(|a, b| a.0.cmp(&b.0));
    for (name, count, bits, error) in &kinds {
        let n = *count as f64;
        out += &format!("{count:>6} x   {name}: {:.3} bits, relative error {:.4}\n", bits / n, error / n);
    }
    let over = if report.settings.method == Method::Gptq { ", of outputs on the rows" } else { "" };
    out += &format!("error      {:.6e} squared, over all matrices{over}", report.error);
    if let Some(bound) = report.bound {
        let gap = if bound > 0.0 { 100.0 * (report.error / bound - 1.0) } else { 0.0 };
        out += &format!("; no choice from the grid has less than {bound:.6e} ({gap:.3} % below)");
    }
    if let Some((all, shorter)) = report.pairs {
        out += &format!(
            "\nblocks     do not divide the matrix in {shorter} of {all} pairs of matrix and configuration; its last block is shorter"
        );
    }
    if report.settings.rank > 0 {
        let place = report.output.join("adapter");
        out += &format!(
            "\nadapter    {}: lorimer train --model {} --adapter {}",
            place.display(),
            report.output.display(),
            place.display()
        );
    }
    out
}
