//! `lorimer bench plan`

use std::process::{Command, ExitCode};

use anyhow::{Result, bail};
use clap::Args;
use lorimer_cli::Global;
use lorimer_cli::common::{self, ModelArgs};
use lorimer_cli::flags::show_bytes;
use serde_json::json;

use crate::measure::{answer, short_name};

/// Each of twelve settings is planned, then run for some steps in a process of its own
#[derive(Args)]
pub struct BenchPlan {
    #[command(flatten)]
    model: ModelArgs,
    /// A file of rows
    #[arg(long, default_value = "data/sentiment-movies.train.jsonl")]
    work: String,
    /// Optimiser steps of each
    #[arg(long, default_value_t = 6)]
    steps: usize,
}

/// Work (a file if not `dense`) and flags of the settings that `bench plan` tries.
const SETTINGS: [(bool, &str); 12] = [
    (false, ""),
    (false, "--dtype bf16"),
    (false, "--dtype nf4"),
    (false, "--dtype stored --optimizer adamw-8bit"),
    (false, "--checkpointing on"),
    (false, "--batch-size 32 --rank 64"),
    (false, "--batch-size 16 --no-share-prefixes"),
    (false, "--target-modules q_proj,v_proj --batch-size 16"),
    (false, "--batch-size 2 --rank 128 --optimizer adamw-8bit"),
    (true, ""),
    (true, "--checkpointing on --dtype nf4"),
    (false, "--method dora"),
];

impl BenchPlan {
    /// Measures and prints.
    pub fn run(self, global: Global) -> Result<ExitCode> {
        if self.steps < 2 || self.steps > 10_000 {
            bail!("--steps should be 2 to 10000");
        }
        let mut rows = Vec::new();
        for (dense, flags) in SETTINGS {
            let work = if dense { "dense" } else { &self.work };
            tracing::info!("{work} {flags}");
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["bench", "train", "--once", "-q", "--work", work, "--model"]).arg(&self.model.model);
            command.args(["--steps", &self.steps.to_string()]).args(flags.split_whitespace());
            if let Some(tokenizer) = &self.model.tokenizer {
                command.arg("--tokenizer").arg(tokenizer);
            }
            let found = answer(command, &format!("bench train {flags}"))?;
            let number = |field: &str| found[field].as_f64().unwrap_or(f64::NAN);
            let error = number("planned_peak_bytes") / number("peak_bytes") - 1.0;
            rows.push(json!({
                "work": work, "flags": flags, "planned_peak_bytes": found["planned_peak_bytes"],
                "peak_bytes": found["peak_bytes"], "error": error,
            }));
        }
        common::print(global, &json!({ "rows": rows }), || {
            let mut out =
                format!("{:<30} {:<52} {:>10} {:>10} {:>7}\n", "work", "flags", "planned", "measured", "error");
            for row in &rows {
                let text = |field: &str| row[field].as_str().unwrap_or_default().to_string();
                let bytes = |field: &str| show_bytes(row[field].as_f64().unwrap_or_default() as u64);
                out += &format!(
                    "{:<30} {:<52} {:>10} {:>10} {:>6.1}%\n",
                    short_name(&text("work")),
                    text("flags"),
                    bytes("planned_peak_bytes"),
                    bytes("peak_bytes"),
                    100.0 * row["error"].as_f64().unwrap_or(f64::NAN)
                );
            }
            out.trim_end().to_string()
        })
    }
}
