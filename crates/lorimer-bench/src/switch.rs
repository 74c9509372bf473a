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

/// What the sparse adapters' entries are chosen by.
const MASKS: [&str; 3] = ["random", "struct", "block"];

/// Two LoRAs of random numbers, and the weights that they go into.
struct Loras {
    /// The base's weight itself, and a copy of it.
    weights: Vec<(Tensor, Tensor)>,
    /// A and B of each LoRA on each weight.
    factors: Vec<[(Tensor, Tensor); 2]>,
}

impl Loras {
    fn new(model: &dyn BaseModel, rank: usize) -> Result<Self> {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let mut random = |rows: usize, columns: usize| -> Result<Tensor> {
            let data: Vec<f32> = (0..rows * columns).map(|_| rng.random_range(-0.01..0.01)).collect();
            Ok(Tensor::from_vec(data, (rows, columns), &Device::Cpu)?)
        };
        let (mut weights, mut factors) = (Vec::new(), Vec::new());
        for (site, projection) in model.projections().into_iter().filter(|(site, _)| site.layer.is_some()) {
            let FrozenWeight::Dense(weight) = &projection.weight else {
                bail!("the base is quantised; load it with --dtype f32")
            };
            if weight.dtype() != DType::F32 {
                bail!("a LoRA is fused in f32 here; load the base with --dtype f32");
            }
            let mut pair = || -> Result<_> { Ok((random(rank, site.inputs)?, random(site.outputs, rank)?)) };
            factors.push([pair()?, pair()?]);
            weights.push((weight.clone(), weight.copy()?));
        }
        Ok(Self { weights, factors })
    }

    /// Adds one of the LoRAs to the weights, times `scale`.
    fn fuse(&self, which: usize, scale: f64) -> Result<()> {
        let mut all = self.weights.iter().zip(&self.factors);
        Ok(all.try_for_each(|((weight, _), pair)| add_product(weight, &pair[which].1, &pair[which].0, scale))?)
    }

    /// Writes the copies back.
    fn restore(&self) -> Result<()> {
        Ok(self.weights.iter().try_for_each(|(weight, from)| copy_into(weight, from))?)
    }
}

/// Milliseconds of each kind of work, in the order in which they came first.
#[derive(Default)]
struct Timings(Vec<(String, Vec<f64>)>);

impl Timings {
    fn add(&mut self, name: &str, milliseconds: f64) {
        match self.0.iter_mut().find(|(n, _)| n == name) {
            Some((_, all)) => all.push(milliseconds),
            None => self.0.push((name.to_string(), vec![milliseconds])),
        }
    }

    /// Median and 99th percentile of each.
    fn quantiles(self) -> Vec<(String, f64, f64)> {
        let one = |(name, mut ms): (String, Vec<f64>)| {
            let (p50, p99) = quantiles(&mut ms);
            (name, p50, p99)
        };
        self.0.into_iter().map(one).collect()
    }
}

impl BenchSwitch {
    /// Measures and prints.
    pub fn run(self, global: Global) -> Result<ExitCode> {
        if self.rounds == 0 || self.rounds > 1_000_000 || self.rank == 0 {
            bail!("--rounds and --rank should be at least 1");
        }
        let (mut base, _) = common::open_base(&self.model, global)?;
        let before = fingerprint(base.model())?;
        let sparse: Vec<[Entries; 2]> =
            MASKS.iter().map(|mask| self.sparse_adapters(base.model(), mask)).collect::<Result<_>>()?;
        let loras = Loras::new(base.model(), self.rank)?;
        let mut timings = Timings::default();
        let bar = common::bar(self.rounds as u64 + 1, "switching {bar:30} {pos}/{len} rounds", global);
        for round in 0..=self.rounds {
            // The first round warms up.
            let mut unused = Timings::default();
            let into = if round > 0 { &mut timings } else { &mut unused };
            self.round(round, base.model.as_mut(), &sparse, &loras, into)?;
            bar.inc(1);
        }
        bar.finish_and_clear();
        if fingerprint(base.model())? != before {
            bail!("the base is not what it was");
        }
        self.report(&timings.quantiles(), sparse[0][0].len(), global)
    }

    /// Two sparse adapters of random values on other entries.
    fn sparse_adapters(&self, model: &dyn BaseModel, mask: &str) -> Result<[Entries; 2]> {
        let of = |seed: u64| -> Result<Entries> {
            let mut settings = Map::new();
            settings.insert("density".into(), json!(self.density));
            settings.insert("mask_type".into(), json!(mask));
            settings.insert("init_weights".into(), Value::Bool(false));
            Ok(Entries::of(model, &Adapter::attach(model, methods::build("shira", &settings)?, seed)?)?)
        };
        Ok([of(1)?, of(2)?])
    }

    /// Everything once.
    fn round(
        &self,
        round: usize,
        model: &mut dyn BaseModel,
        sparse: &[[Entries; 2]],
        loras: &Loras,
        timings: &mut Timings,
    ) -> Result<()> {
        let (from, to) = (round % 2, (round + 1) % 2);
        let mut switcher = Switcher::new(model);
        for (mask, pair) in MASKS.iter().zip(sparse) {
            timings.add(&format!("shira {mask}: put on"), timed(|| Ok(switcher.add(&pair[from], 1.0)?))?);
            timings.add(&format!("shira {mask}: switch"), timed(|| Ok(switcher.switch(&pair[to])?))?);
            timings.add(&format!("shira {mask}: take off"), timed(|| Ok(switcher.clear()?))?);
        }
        drop(switcher);
        timings.add("lora: fuse", timed(|| loras.fuse(from, 1.0))?);
        timings.add("lora: switch", timed(|| loras.fuse(from, -1.0).and_then(|()| loras.fuse(to, 1.0)))?);
        timings.add("lora: restore a copy", timed(|| loras.restore())?);
        Ok(())
    }

    fn report(&self, table: &[(String, f64, f64)], entries: usize, global: Global) -> Result<ExitCode> {
        let of = |name: &str| table.iter().find(|(n, ..)| n == name).map_or(f64::NAN, |(_, p50, _)| *p50);
        let ratio = |mask: &&str| {
            json!({
                "mask": mask, "fuse": of("lora: fuse") / of(&format!("shira {mask}: put on")),
                "switch": of("lora: switch") / of(&format!("shira {mask}: switch")),
            })
        };
        let ratios: Vec<Value> = MASKS.iter().map(ratio).collect();
        let rows: Vec<Value> = table
            .iter()
            .map(|(n, p50, p99)| json!({ "what": n, "p50_milliseconds": p50, "p99_milliseconds": p99 }))
            .collect();
        let json = json!({
            "rows": rows, "ratios": ratios, "entries": entries, "rank": self.rank, "rounds": self.rounds, "base_identical": true,
        });
        common::print(global, &json, || {
            let mut out = format!("{:<26}{:>12}{:>12}\n", "", "p50 ms", "p99 ms");
            for (name, p50, p99) in table {
                out += &format!("{name:<26}{p50:>12.2}{p99:>12.2}\n");
            }
            for (mask, r) in MASKS.iter().zip(&ratios) {
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
