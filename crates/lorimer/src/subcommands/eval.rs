//! `lorimer eval`

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, anyhow, bail};
use clap::Args;
use lorimer::adapter::algebra::resize::{largest_rank, resize};
use lorimer::adapter::pruning::check_record;
use lorimer::adapter::{Adapter, Attached, StoredAdapter};
use lorimer::model::Base;
use lorimer::train::data::Format;
use lorimer::train::{EncodeOptions, Example, evaluate, find_choices};
use serde_json::json;

use lorimer_cli::common::{ModelArgs, parse_adapter};
use lorimer_cli::{Global, common};

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
    /// Measure one LoRA cut to its first ranks: `all`, or ranks separated by commas
    #[arg(long, value_name = "RANKS")]
    rank: Option<String>,
    /// With --rank: name the smallest rank whose loss is within so much of the best
    #[arg(long, value_name = "LOSS", requires = "rank")]
    rank_for_loss: Option<f64>,
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
    /// Write each row's loss a supervised token, and the number of these, as JSON lines
    #[arg(long, value_name = "FILE", conflicts_with = "rank")]
    rows: Option<PathBuf>,
}

impl Eval {
    pub fn run(self, global: Global) -> Result<ExitCode> {
        let (base, _) = common::open_shared(&self.model, global)?;
        base.config.decoder("`lorimer eval`")?;
        let options = EncodeOptions {
            format: self.format,
            max_length: self.max_length,
            skip_bad_rows: self.skip_bad_rows,
            limit: self.limit,
            ..Default::default()
        };
        let (examples, _) = common::load_data(&self.data, &base.text, &options)?;
        let choices = if self.choices.is_empty() { find_choices(&examples) } else { self.choices.clone() };
        if let Some(ranks) = &self.rank {
            return self.curve(ranks, &base, &examples, &choices, global);
        }
        let adapters = common::open_adapters(&base, &self.adapter)?;
        let bar = common::bar(examples.len() as u64, "evaluating {bar:30} {pos}/{len} rows {eta}", global);
        let clock = Instant::now();
        let attached = common::attached(&adapters)?;
        let e = evaluate(base.model(), &base.text, &attached, &examples, &choices, |n| bar.set_position(n as u64))?;
        bar.finish_and_clear();
        if let Some(path) = &self.rows {
            let mut lines = String::new();
            for row in &examples {
                let e = evaluate(base.model(), &base.text, &attached, std::slice::from_ref(row), &[], |_| {})?;
                lines += &format!("{}\n", json!({ "loss": e.loss, "supervised_tokens": e.supervised_tokens }));
            }
            lorimer::model::files::write_atomic(path, lines.as_bytes())?;
        }
        let mut json = serde_json::to_value(&e)?;
        json["seconds"] = clock.elapsed().as_secs_f64().into();
        common::print(global, &json, || {
            let mut out = format!(
                "rows             {}\nloss             {:.4} a supervised token ({} of them)\nperplexity       {:.3}\nexact match      {:.1} %\n",
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

    /// The adapter cut to each rank.
    fn curve(
        &self,
        ranks: &str,
        base: &Base,
        examples: &[Example],
        choices: &[String],
        global: Global,
    ) -> Result<ExitCode> {
        let [(folder, 1.0)] = &self.adapter[..] else { bail!("--rank wants one --adapter, at weight 1") };
        let stored = StoredAdapter::read(folder)?;
        check_record(&stored, &base.path, &base.model().shape().layers)?;
        let most = largest_rank(&stored)?;
        let ranks: Vec<usize> = match ranks {
            "all" => (1..=most).collect(),
            list => list.split(',').map(|r| r.trim().parse()).collect::<Result<_, _>>().map_err(|_| {
                anyhow!("--rank {list} should be `all`, or ranks between 1 and {most} separated by commas")
            })?,
        };
        let bar = common::bar(ranks.len() as u64, "evaluating {bar:30} {pos}/{len} ranks {eta}", global);
        let mut rows = Vec::new();
        for &rank in &ranks {
            let adapter = Adapter::load_whole(base.model(), &resize(&stored, rank)?)?;
            let e = evaluate(base.model(), &base.text, &Attached::one(&adapter), examples, choices, |_| {})?;
            rows.push((rank, e));
            bar.inc(1);
        }
        bar.finish_and_clear();
        let best = rows.iter().map(|(_, e)| e.loss).fold(f64::INFINITY, f64::min);
        let enough = self.rank_for_loss.and_then(|within| {
            let near = rows.iter().filter(|(_, e)| e.loss <= best + within);
            near.map(|(rank, _)| *rank).min()
        });
        let curve: Vec<_> = rows
            .iter()
            .map(|(rank, e)| {
                json!({ "rank": rank, "loss": e.loss, "exact_match": e.exact_match, "choice_accuracy": e.choice_accuracy })
            })
            .collect();
        let json = json!({ "ranks": curve, "rank_for_loss": enough });
        common::print(global, &json, || {
            let mut out = format!("{:>5}{:>10}{:>14}{:>18}\n", "rank", "loss", "exact match", "choice accuracy");
            for (rank, e) in &rows {
                let accuracy = e.choice_accuracy.map_or(String::new(), |a| format!("{:.1} %", 100.0 * a));
                let exact = format!("{:.1} %", 100.0 * e.exact_match);
                out += &format!("{rank:>5}{:>10.4}{exact:>14}{accuracy:>18}\n", e.loss);
            }
            if let (Some(rank), Some(within)) = (enough, self.rank_for_loss) {
                out += &format!("rank {rank} is the smallest within {within} of the best loss\n");
            }
            out
        })
    }
}
