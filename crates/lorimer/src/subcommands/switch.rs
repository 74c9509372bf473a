//! `lorimer switch`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;
use lorimer::adapter::StoredAdapter;
use lorimer::adapter::algebra::switch::{Entries, Switcher};
use lorimer::model::{BaseModel, Frozen};
use lorimer::serve::{Sampling, generate};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use lorimer_bench::switch::{fingerprint, quantiles, timed};
use lorimer_cli::common::ModelArgs;
use lorimer_cli::{Global, common};

/// Keep one base in memory and change sparse adapters (shira) under it in place: milliseconds a switch, and the base comes back bit for bit
#[derive(Args)]
pub struct Switch {
    /// Adapter folders, in the order in which they are put on
    #[arg(required = true)]
    adapters: Vec<PathBuf>,
    /// Put all of them on at once in place of one after the other, and tell how much they overlap
    #[arg(long)]
    fuse: bool,
    /// A message that is answered after each switch
    #[arg(long, short)]
    prompt: Option<String>,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 32)]
    max_tokens: usize,
    /// Then so many switches at random, with their latencies
    #[arg(long, default_value_t = 100)]
    rounds: usize,
    #[command(flatten)]
    model: ModelArgs,
}

impl Switch {
    pub fn run(self, global: Global) -> Result<ExitCode> {
        if self.rounds > 10_000_000 {
            bail!("--rounds should be at most 10000000");
        }
        let (mut base, _) = common::open_base(&self.model, global)?;
        let mut loaded = Vec::new();
        for folder in &self.adapters {
            let stored = StoredAdapter::read(folder)?;
            let entries = Entries::of(base.model(), &common::attach(&base, &stored)?)?;
            loaded.push((folder.display().to_string(), entries));
        }
        let tokens = match &self.prompt {
            None => None,
            Some(prompt) => {
                let messages = [json!({ "role": "user", "content": prompt })];
                let text = base.text.needed_template()?.render(&messages, None, true)?;
                Some(base.text.encode(&text, false)?.ids)
            }
        };
        let before = fingerprint(base.model())?;
        let text = &base.text;
        let mut switcher = Switcher::new(base.model.as_mut());
        let answer = |model: &dyn BaseModel| -> Result<Option<String>> {
            let Some(tokens) = &tokens else { return Ok(None) };
            let greedy = Sampling::default();
            Ok(Some(generate(model, text, &Frozen, tokens, self.max_tokens, &greedy, 0, &[], |_| {})?.text))
        };
        let mut switches = Vec::new();
        let mut overlaps = Vec::new();
        if self.fuse {
            for (i, (a, one)) in loaded.iter().enumerate() {
                for (b, other) in &loaded[i + 1..] {
                    overlaps.push(json!({ "a": a, "b": b, "overlap": one.overlap(other) }));
                }
            }
            let ms = timed(|| Ok(loaded.iter().try_for_each(|(_, entries)| switcher.add(entries, 1.0))?))?;
            let names: Vec<&str> = loaded.iter().map(|(name, _)| name.as_str()).collect();
            switches
                .push(json!({ "adapter": names.join(" + "), "milliseconds": ms, "text": answer(switcher.model())? }));
        } else {
            for (name, entries) in &loaded {
                let ms = timed(|| Ok(switcher.switch(entries)?))?;
                switches.push(json!({ "adapter": name, "entries": entries.len(), "milliseconds": ms, "text": answer(switcher.model())? }));
            }
        }
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let mut latencies = Vec::new();
        for _ in 0..self.rounds {
            let to = &loaded[rng.random_range(0..loaded.len())].1;
            latencies.push(timed(|| Ok(switcher.switch(to)?))?);
        }
        switcher.clear()?;
        drop(switcher);
        let identical = fingerprint(base.model())? == before;
        let (p50, p99) = quantiles(&mut latencies);
        let json = json!({
            "switches": switches, "overlaps": overlaps, "rounds": self.rounds, "p50_milliseconds": p50, "p99_milliseconds": p99,
            "base_identical": identical,
        });
        if !identical {
            bail!("the base is not what it was after {} switches", self.rounds);
        }
        common::print(global, &json, || {
            shown(&switches, &overlaps)
                + &format!(
                    "{} random switches: p50 {p50:.2} ms, p99 {p99:.2} ms; afterwards the base is bit for bit what it was",
                    self.rounds
                )
        })
    }
}

/// A line for each switch and, where there is one, its answer; a line for each pair of adapters that were put on together.
fn shown(switches: &[Value], overlaps: &[Value]) -> String {
    let mut out = String::new();
    for s in switches {
        out += &format!(
            "{} ({:.2} ms)\n",
            s["adapter"].as_str().unwrap_or_default(),
            s["milliseconds"].as_f64().unwrap_or(0.0)
        );
        if let Some(text) = s["text"].as_str() {
            out += &format!("  {}\n", text.replace('\n', "\n  "));
        }
    }
    for o in overlaps {
        let overlap = &o["overlap"];
        out += &format!(
            "{} and {} share {} entries ({:.2} % of the smaller), interference {:.4}\n",
            o["a"].as_str().unwrap_or_default(),
            o["b"].as_str().unwrap_or_default(),
            overlap["shared"],
            100.0 * overlap["share"].as_f64().unwrap_or(0.0),
            overlap["interference"].as_f64().unwrap_or(0.0)
        );
    }
    out
}
