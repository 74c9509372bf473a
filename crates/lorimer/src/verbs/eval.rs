//! `lorimer eval`

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use lorimer::train::data::Format;
use lorimer::train::{EncodeOptions, evaluate, find_choices};

use crate::common::{ModelArgs, parse_adapter};
use crate::{Global, common};

/// Measure a base, with or without adapters, on a data file
#[derive(Args)]
pub struct Eval {
    #[command(flatten)]
    model: ModelArgs,
    /// Data file: .jsonl, .json, .csv or .parquet
    #[arg(long)]
    data: PathBuf,
    /// Adapter folder, with an optional weight (FOLDER=0.5); repeatable
    #[arg(long, value_parser = parse_adapter)]
    adapter: Vec<(PathBuf, f64)>,
    /// Answers whose likelihoods are compared, separated by commas [default: the data's own, if they are few]
    #[arg(long, value_delimiter = ',')]
    choices: Vec<String>,
    /// Form of the rows: messages, alpaca, sharegpt, prompt-completion, text [default: told by the keys]
    #[arg(long)]
    format: Option<Format>,
    /// Longest sequence in tokens
    #[arg(long, default_value_t = 1024)]
    max_length: usize,
    /// Only the first rows
    #[arg(long)]
    limit: Option<usize>,
    /// Count bad rows instead of stopping at the first
    #[arg(long)]
    skip_bad_rows: bool,
}

impl Eval {
    pub fn run(self, global: Global) -> Result<ExitCode> {
        let (base, _) = common::open_base(&self.model, global)?;
        let options = EncodeOptions {
            format: self.format,
            max_length: self.max_length,
            skip_bad_rows: self.skip_bad_rows,
            limit: self.limit,
            ..Default::default()
        };
        let (examples, _) = common::load_data(&self.data, &base.text, &options)?;
        let choices = if self.choices.is_empty() { find_choices(&examples) } else { self.choices };
        let adapters = common::open_adapters(&base, &self.adapter)?;
        let bar = common::bar(examples.len() as u64, "evaluating {bar:30} {pos}/{len} rows {eta}", global);
        let clock = Instant::now();
        let attached = common::attached(&adapters)?;
        let e = evaluate(&base.model, &base.text, &attached, &examples, &choices, |n| bar.set_position(n as u64))?;
        bar.finish_and_clear();
        let mut json = serde_json::to_value(&e)?;
        json["seconds"] = clock.elapsed().as_secs_f64().into();
        common::print(global, &json, || {
            let mut out = format!(
                "rows             {}\nloss             {:.4} a learnt token ({} of them)\nperplexity       {:.3}\nexact match      {:.1} %\n",
                e.examples,
                e.loss,
                e.supervised_tokens,
                e.perplexity,
                100.0 * e.exact_match
            );
            if let Some(accuracy) = e.choice_accuracy {
                out += &format!("choice accuracy  {:.1} % among {}\n", 100.0 * accuracy, e.choices.join(", "));
            }
            out
        })
    }
}
