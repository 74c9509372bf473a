//! `lorimer inspect`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;
use lorimer::adapter::file::inspect::{ExpertReport, inspect};
use lorimer::adapter::gates::{Gated, ModuleGates};
use lorimer::adapter::{Gates, StoredAdapter};
use serde_json::Value;

use lorimer_cli::common::{DtypeFlag, ModelArgs};
use lorimer_cli::{Global, common};

/// Show what is in an adapter: method, rank, size, and each module's norm and effective rank; with --text what its gates are for a text
#[derive(Args)]
pub struct Inspect {
    /// Adapter folder
    adapter: PathBuf,
    /// Show the gates that a text gets from an adapter whose gates depend on the token (xlora, llava-mole, smora, flylora): means over its tokens, by
    /// layer and by projection; repeatable
    #[arg(long)]
    text: Vec<String>,
    /// With --text, the base: an alias, a Hugging Face hub id, a folder or a .gguf file [default: smollm2-135m]
    #[arg(long, short, requires = "text")]
    model: Option<String>,
    /// With --text, the type that the base's weights are kept in [default: f32]
    #[arg(long, value_enum, requires = "text")]
    dtype: Option<DtypeFlag>,
}

/// The gates of some texts, with their means by layer and by projection.
struct TextGates {
    gates: Gates,
    layers: Vec<ModuleGates>,
    projections: Vec<ModuleGates>,
}

/// The layer that a projection is in, by its path.
fn layer_of(path: &str) -> String {
    path.split('.').find(|part| part.parse::<usize>().is_ok()).unwrap_or("-").to_string()
}

/// The projection's own name.
fn role_of(path: &str) -> String {
    path.rsplit('.').next().unwrap_or(path).to_string()
}

impl TextGates {
    fn new(gates: Gates) -> Self {
        let (layers, projections) = (gates.grouped(layer_of), gates.grouped(role_of));
        Self { gates, layers, projections }
    }

    fn json(&self) -> Result<Value> {
        let mut json = serde_json::to_value(&self.gates)?;
        json["layers"] = serde_json::to_value(&self.layers)?;
        json["projections"] = serde_json::to_value(&self.projections)?;
        Ok(json)
    }

    /// One group's line: each expert's gate, or of many ranks what they range over.
    fn line(&self, group: &ModuleGates) -> String {
        match self.gates.of {
            Gated::Experts => group.mean.iter().map(|mean| format!(" {mean:>9.4}")).collect(),
            Gated::Ranks => {
                let least = group.used.iter().copied().fold(f64::INFINITY, f64::min);
                let most = group.used.iter().copied().fold(0.0, f64::max);
                let never = group.used.iter().filter(|used| **used == 0.0).count();
                let largest = group.mean.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                format!(" {:>8.2} % {:>8.2} % {never:>9} {largest:>12.4}", 100.0 * least, 100.0 * most)
            }
        }
    }

    fn show(&self) -> String {
        let Gates { of, count, rows, .. } = &self.gates;
        let head = match of {
            Gated::Experts => (0..*count).map(|i| format!(" {:>9}", format!("expert {i}"))).collect(),
            Gated::Ranks => format!(" {:>10} {:>10} {:>9} {:>12}", "least used", "most used", "never", "largest mean"),
        };
        let what = if *of == Gated::Experts { "experts" } else { "ranks" };
        let mut out = format!("\ngates of {count} {what}, means over {rows} tokens\n");
        for (title, groups) in [("layer", &self.layers), ("projection", &self.projections)] {
            out += &format!("{title:<20}{head}\n");
            groups.iter().for_each(|group| out += &format!("{:<20}{}\n", group.name, self.line(group)));
        }
        out
    }
}

impl Inspect {
    pub fn run(self, global: Global) -> Result<ExitCode> {
        let stored = StoredAdapter::read(&self.adapter)?;
        let report = inspect(&stored)?;
        let gates = match self.text.is_empty() {
            true => None,
            false => Some(self.gates(global)?),
        };
        let mut json = serde_json::to_value(&report)?;
        if let Some(gates) = &gates {
            json["gates"] = gates.json()?;
        }
        common::print(global, &json, || {
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
            out + &gates.map_or(String::new(), |gates| gates.show())
        })
    }

    /// The gates of the texts.
    fn gates(&self, global: Global) -> Result<TextGates> {
        let model = self.model.clone().unwrap_or_else(|| "smollm2-135m".into());
        let own = ModelArgs { model, dtype: self.dtype.unwrap_or_default(), tokenizer: None };
        let (base, _) = common::open_base(&own, global)?;
        let adapters = common::open_adapters(&base, &[(self.adapter.clone(), 1.0)])?;
        let Some((adapter, _)) = adapters.first() else { bail!("there is no adapter") };
        let mut tokens = Vec::new();
        for text in &self.text {
            let ids = base.text.encode(text, true)?.ids;
            base.model().check_length(ids.len())?;
            tokens.push(ids);
        }
        let gates = Gates::over(base.model(), adapter, tokens.iter().map(Vec::as_slice))?;
        Ok(TextGates::new(gates))
    }
}
