//! `lorimer check`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use lorimer::adapter::pruning::check_record;
use lorimer::adapter::{Adapter, StoredAdapter};
use lorimer::train::run::session::replay;
use serde_json::json;

use lorimer_cli::common::ModelArgs;
use lorimer_cli::{Global, common};

/// Largest difference in log p at which golden prompts still count as replayed.
const TOLERANCE: f64 = 1e-2;

/// Check an adapter against its base: every tensor used, an effect, golden prompts replayed. Exit 1 if anything is wrong
#[derive(Args)]
pub struct Check {
    /// Adapter folder
    adapter: PathBuf,
    #[command(flatten)]
    model: ModelArgs,
}

impl Check {
    pub fn run(self, global: Global) -> Result<ExitCode> {
        let stored = StoredAdapter::read(&self.adapter)?;
        let (base, _) = common::open_shared(&self.model, global)?;
        check_record(&stored, &base.path, &base.model().shape().layers)?;
        let (adapter, accounting) = Adapter::load(base.model(), &stored)?;
        let effect = adapter.effect(base.model())?;
        let has_effect = adapter.has_effect(base.model())?;
        let golden = if accounting.complete() { replay(&base, &adapter, &stored)? } else { None };
        let same_base =
            stored.manifest.as_ref().and_then(|m| m.base.as_ref()).map(|b| b.fingerprint == base.fingerprint);
        let content = match &stored.manifest {
            Some(m) => Some(m.content_id == stored.content_id()?),
            None => None,
        };
        let mut problems = Vec::new();
        problems.extend(accounting.problem());
        if !has_effect {
            problems.push("the adapter changes nothing".into());
        }
        if content == Some(false) {
            problems.push("configuration or tensors are not those that lorimer.json names".into());
        }
        if let Some(d) = golden.filter(|d| *d > TOLERANCE) {
            let storage = base.model().projections().first().map(|(_, p)| p.weight.storage_name());
            let trained = stored.manifest.as_ref().and_then(|m| m.training["storage"].as_str());
            let why = match (same_base, trained, storage) {
                (Some(false), ..) => "; this is not the base it was trained on".to_string(),
                (_, Some(then), Some(now)) if then != now => {
                    format!("; the base was kept as {then} in training and is {now} now: see --dtype")
                }
                _ => String::new(),
            };
            problems.push(format!("golden prompts differ by {d:.4} in log p, at most {TOLERANCE} is expected{why}"));
        }
        let ok = problems.is_empty();
        let json = json!({
            "ok": ok, "used": accounting.used.len(), "refused": accounting.refused, "missing": accounting.missing,
            "effect": effect, "golden_difference": golden, "same_base": same_base, "content_matches": content,
            "problems": problems,
        });
        common::print(global, &json, || {
            let mut out = format!(
                "tensors   {} used, {} refused, {} modules missing\n",
                accounting.used.len(),
                accounting.refused.len(),
                accounting.missing.len()
            );
            out += &format!("effect    {} of the weights' norm\n", effect.map_or("-".into(), |e| format!("{e:.2e}")));
            out += &match golden {
                Some(d) => format!("golden    log p replayed within {d:.2e}\n"),
                None => "golden    none recorded\n".into(),
            };
            out + &if ok { "ok".to_string() } else { format!("NOT ok: {}", problems.join("; ")) }
        })?;
        Ok(if ok { ExitCode::SUCCESS } else { ExitCode::from(1) })
    }
}
