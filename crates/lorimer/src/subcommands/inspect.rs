//! `lorimer inspect`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use lorimer::adapter::StoredAdapter;
use lorimer::adapter::file::inspect::{ExpertReport, inspect};

use lorimer_cli::{Global, common};

/// Show what is in an adapter: method, rank, size, and each module's norm and effective rank
#[derive(Args)]
pub struct Inspect {
    /// Adapter folder
    adapter: PathBuf,
}

impl Inspect {
    pub fn run(self, global: Global) -> Result<ExitCode> {
        let report = inspect(&StoredAdapter::read(&self.adapter)?)?;
        common::print(global, &report, || {
            let expert = |(i, e): (usize, &ExpertReport)| {
                let other = if e.content_matches == Some(false) { " (NOT the one of lorimer.json)" } else { "" };
                format!("expert {i:<5}{}{other}\n", e.path.display())
            };
            let experts: Vec<String> = report.experts.iter().enumerate().map(expert).collect();
            let mut out = format!(
                "{} ({}), rank {}, alpha {}\nbase        {}\nparameters  {} ({} bytes)\ncontent id  {}{}\n{}\n{:44} {:>5} {:>12} {:>15}\n",
                report.method,
                report.peft_type,
                report.rank.map_or("-".into(), |r| r.to_string()),
                report.alpha.map_or("-".into(), |a| a.to_string()),
                report.base.as_deref().unwrap_or("-"),
                common::short(report.parameters),
                report.bytes,
                report.content_id,
                match report.content_matches {
                    Some(true) => " (as lorimer.json says)",
                    Some(false) => " (NOT what lorimer.json says: the files were changed)",
                    None => "",
                },
                experts.concat(),
                "module",
                "rank",
                "norm",
                "effective rank",
            );
            for m in &report.modules {
                let number = |v: Option<f64>| v.map_or("-".into(), |v| format!("{v:.4}"));
                let remarks: Vec<String> = m.remarks.iter().map(|(name, v)| format!("  {name} {v:.3}")).collect();
                out += &format!(
                    "{:44} {:>5} {:>12} {:>15}{}\n",
                    m.name,
                    m.rank.map_or("-".into(), |r| r.to_string()),
                    number(m.norm),
                    number(m.effective_rank),
                    remarks.concat()
                );
            }
            for (title, tensors) in [("whole parameters", &report.whole), ("beside the modules", &report.beside)] {
                if !tensors.is_empty() {
                    out += &format!("\n{title:44} {:>12}\n", "values");
                    tensors.iter().for_each(|(name, values)| out += &format!("{name:44} {values:>12}\n"));
                }
            }
            if !report.unknown.is_empty() {
                out += &format!("\nnot known to {}: {}\n", report.method, report.unknown.join(", "));
            }
            out
        })
    }
}
