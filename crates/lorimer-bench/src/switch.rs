//! `lorimer bench switch`

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use candle_core::{DType, Device, Tensor};
use clap::Args;
use lorimer_adapter::algebra::switch::{Entries, Switcher};
use lorimer_adapter::{Adapter, methods};
use lorimer_model::BaseModel;
use lorimer_tensor::FrozenWeight;
use lorimer_tensor::ops::sparse::{add_product, copy_into};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use lorimer_cli::common::ModelArgs;
use lorimer_cli::{Global, common};

/// Hash of every projection's numbers.
pub fn fingerprint(model: &dyn BaseModel) -> Result<String> {
    let mut hash = Sha256::new();
    for (_, base) in model.projections() {
        let values = base.dense(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        for chunk in values.chunks(1 << 14) {
            hash.update(chunk.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>());
        }
    }
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

/// Milliseconds at some quantiles.
pub fn quantiles(milliseconds: &mut [f64]) -> (f64, f64) {
    milliseconds.sort_by(f64::total_cmp);
    let at =
        |q: f64| milliseconds.get(((milliseconds.len() as f64 * q) as usize).min(milliseconds.len().saturating_sub(1)));
    (at(0.5).copied().unwrap_or(0.0), at(0.99).copied().unwrap_or(0.0))
}

/// Milliseconds of some work.
pub fn timed(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let clock = Instant::now();
    work()?;
    Ok(1e3 * clock.elapsed().as_secs_f64())
}

/// Switching sparse adapters against fusing LoRAs into the same weights, warm and in turns
#[derive(Args)]
pub struct BenchSwitch {
    /// Share of the weights that a sparse adapter changes
    #[arg(long, default_value_t = 0.01)]
    density: f64,
    /// Rank of the LoRAs
    #[arg(long, default_value_t = 32)]
    rank: usize,
    /// Rounds; each does everything once
    #[arg(long, default_value_t = 30)]
    rounds: usize,
    #[command(flatten)]
    model: ModelArgs,
}

impl BenchSwitch {
    /// Measures and prints.
    pub fn run(self, global: Global) -> Result<ExitCode> {
        if self.rounds == 0 || self.rounds > 1_000_000 || self.rank == 0 {
            bail!("--rounds and --rank should be at least 1");
        }
        let (mut base, _) = common::open_base(&self.model, global)?;
        let before = fingerprint(base.model())?;
        let masks = ["random", "struct", "block"];
        let mut sparse: Vec<[Entries; 2]> = Vec::new();
        for mask in masks {
            let of = |seed: u64| -> Result<Entries> {
                let mut settings = Map::new();
                settings.insert("density".into(), json!(self.density));
                settings.insert("mask_type".into(), json!(mask));
                settings.insert("init_weights".into(), Value::Bool(false));
                Ok(Entries::of(
                    base.model(),
                    &Adapter::attach(base.model(), methods::build("shira", &settings)?, seed)?,
                )?)
            };
            sparse.push([of(1)?, of(2)?]);
        }
        // Two LoRAs of random numbers, and the weights that they go into.
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let mut random = |rows: usize, columns: usize| -> Result<Tensor> {
            let data: Vec<f32> = (0..rows * columns).map(|_| rng.random_range(-0.01..0.01)).collect();
            Ok(Tensor::from_vec(data, (rows, columns), &Device::Cpu)?)
        };
        let mut weights = Vec::new();
        for (site, projection) in base.model().projections().into_iter().filter(|(site, _)| site.layer.is_some()) {
            let FrozenWeight::Dense(weight) = &projection.weight else {
                bail!("the base is quantised; load it with --dtype f32")
            };
            if weight.dtype() != DType::F32 {
                bail!("a LoRA is fused in f32 here; load the base with --dtype f32");
            }
            let mut loras = Vec::new();
            for _ in 0..2 {
                loras.push((random(self.rank, site.inputs)?, random(site.outputs, self.rank)?));
            }
            weights.push((weight.clone(), loras));
        }
        let copies: Vec<Tensor> = weights.iter().map(|(w, _)| w.copy()).collect::<Result<_, _>>()?;
        let fuse = |which: usize, scale: f64| -> Result<()> {
            Ok(weights.iter().try_for_each(|(w, loras)| add_product(w, &loras[which].1, &loras[which].0, scale))?)
        };
        let restore =
            || -> Result<()> { Ok(weights.iter().zip(&copies).try_for_each(|((w, _), from)| copy_into(w, from))?) };
        let mut rows: Vec<(String, Vec<f64>)> = Vec::new();
        let mut put = |name: &str, ms: f64| match rows.iter_mut().find(|(n, _)| n == name) {
            Some((_, all)) => all.push(ms),
            None => rows.push((name.to_string(), vec![ms])),
        };
        let bar = common::bar(self.rounds as u64 + 1, "switching {bar:30} {pos}/{len} rounds", global);
        for round in 0..=self.rounds {
            // The first round warms up.
            let mut note = |name: &str, ms: f64| {
                if round > 0 {
                    put(name, ms);
                }
            };
            let (from, to) = (round % 2, (round + 1) % 2);
            {
                let mut switcher = Switcher::new(base.model.as_mut());
                for (mask, pair) in masks.iter().zip(&sparse) {
                    note(&format!("shira {mask}: put on"), timed(|| Ok(switcher.add(&pair[from], 1.0)?))?);
                    note(&format!("shira {mask}: switch"), timed(|| Ok(switcher.switch(&pair[to])?))?);
                    note(&format!("shira {mask}: take off"), timed(|| Ok(switcher.clear()?))?);
                }
            }
            note("lora: fuse", timed(|| fuse(from, 1.0))?);
            note("lora: switch", timed(|| fuse(from, -1.0).and_then(|()| fuse(to, 1.0)))?);
            note("lora: restore a copy", timed(restore)?);
            bar.inc(1);
        }
        bar.finish_and_clear();
        if fingerprint(base.model())? != before {
            bail!("the base is not what it was");
        }
        let mut table = Vec::new();
        for (name, mut ms) in rows {
            let (p50, p99) = quantiles(&mut ms);
            table.push((name, p50, p99));
        }
        let of = |name: &str| table.iter().find(|(n, ..)| n == name).map_or(f64::NAN, |(_, p50, _)| *p50);
        let ratios: Vec<Value> = masks
            .iter()
            .map(|mask| {
                json!({
                    "mask": mask, "fuse": of("lora: fuse") / of(&format!("shira {mask}: put on")),
                    "switch": of("lora: switch") / of(&format!("shira {mask}: switch")),
                })
            })
            .collect();
        let rows: Vec<Value> = table
            .iter()
            .map(|(n, p50, p99)| json!({ "what": n, "p50_milliseconds": p50, "p99_milliseconds": p99 }))
            .collect();
        let json = json!({
            "rows": rows, "ratios": ratios, "entries": sparse[0][0].len(), "rank": self.rank, "rounds": self.rounds, "base_identical": true,
        });
        common::print(global, &json, || {
            let mut out = format!("{:<26}{:>12}{:>12}\n", "", "p50 ms", "p99 ms");
            for (name, p50, p99) in &table {
                out += &format!("{name:<26}{p50:>12.2}{p99:>12.2}\n");
            }
            for (mask, r) in masks.iter().zip(&ratios) {
                out += &format!(
                    "shira {mask}: {:.1} times as fast as fusing a LoRA of rank {}, {:.1} times at switching\n",
                    r["fuse"].as_f64().unwrap_or(f64::NAN),
                    self.rank,
                    r["switch"].as_f64().unwrap_or(f64::NAN)
                );
            }
            out + "afterwards the base is bit for bit what it was"
        })
    }
}
