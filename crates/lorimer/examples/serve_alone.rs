//! Requests served together against each of them alone, on a real base:
//!
//! `cargo run --release -p lorimer --example serve_alone -- [--requests 1000] [--dtype int8] [--against f32]`
//!
//! Random requests (the beginnings of real texts, random lengths) over 50 adapters of five methods, or the bare base, run through an engine
//! as they come; then each by itself, in an engine over the base as `--against` keeps it. Tells how many get the same greedy tokens, and how far
//! the log-probabilities of the twenty likeliest tokens are apart at every place before answers part (what differs in logits differs in these).
//! One request of each adapter is also held against the code that trains. With `--dtype` and `--against` alike it ends with an error where tokens
//! differ.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Tensor};
use clap::Parser;
use lorimer::model::pull::{PullOptions, pull};
use lorimer::prelude::*;
use lorimer::serve::engine::Token;
use lorimer::serve::{Engine, EngineSettings, Event, Hosted, Request, Sampling};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

#[derive(Parser)]
struct Arguments {
    /// Base model
    #[arg(long, default_value = "smollm2-135m")]
    model: String,
    /// How the base is kept where requests run together: f32, bf16, stored, int8
    #[arg(long, default_value = "f32")]
    dtype: String,
    /// How it is kept where each runs alone [default: as --dtype]
    #[arg(long)]
    against: Option<String>,
    /// Number of requests
    #[arg(long, default_value_t = 1000)]
    requests: usize,
    /// Folder of JSONL rows with messages, whose texts are the prompts
    #[arg(long, default_value = "data")]
    data: PathBuf,
}

const METHODS: [&str; 5] = ["lora", "dora", "vera", "bone", "hydra"];
const EACH: u64 = 10;

fn load(model: &str, dtype: &str) -> Result<Base> {
    let dtype = match dtype {
        "f32" => LoadDtype::F32,
        "bf16" => LoadDtype::Bf16,
        "stored" => LoadDtype::Stored,
        "int8" => LoadDtype::Int8,
        other => bail!("`{other}` should be f32, bf16, stored or int8"),
    };
    let pulled = pull(model, PullOptions { refresh: false, progress: false })?;
    Ok(Base::prepare(&pulled.path, &OpenOptions { dtype, tokenizer: None })?.load()?)
}

/// Adapters that do something: factors as a method begins with them, moved at random.
fn adapters(base: &Base) -> Result<Vec<(String, Adapter)>> {
    let mut all = Vec::new();
    for name in METHODS {
        for seed in 0..EACH {
            let method = methods::build(name, &serde_json::Map::new())?;
            let adapter = Adapter::attach(base.model(), method, seed)?;
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            for (_, var) in adapter.trainable() {
                let moved: Vec<f32> = (0..var.elem_count()).map(|_| rng.random_range(-0.01..0.01)).collect();
                let moved = Tensor::from_vec(moved, var.shape(), var.device())?.to_dtype(var.dtype())?;
                var.set(&(var.as_tensor() + moved)?)?;
            }
            all.push((format!("{name}-{seed}"), adapter));
        }
    }
    Ok(all)
}

/// User messages of the rows.
fn texts(folder: &Path) -> Result<Vec<String>> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .with_context(|| format!("no folder {}", folder.display()))?
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| p.to_string_lossy().ends_with(".train.jsonl"))
        .collect();
    files.sort();
    let mut texts = Vec::new();
    for file in files {
        for line in std::fs::read_to_string(file)?.lines() {
            let row: Value = serde_json::from_str(line)?;
            texts.extend(row["messages"][0]["content"].as_str().map(str::to_string));
        }
    }
    Ok(texts)
}

/// Runs requests through an engine as they are given, `together` at most under way; the tokens of each.
fn run(base: &Base, requests: &[Request], together: usize) -> Result<Vec<Vec<Token>>> {
    let settings = EngineSettings { pool_bytes: 2 << 30, prefix_cache: together > 1, ..Default::default() };
    let mut engine = Engine::new(base.model(), settings)?;
    let (mut answers, mut places, mut next, mut clock) = (vec![Vec::new(); requests.len()], BTreeMap::new(), 0, 0.0);
    let mut under = 0;
    while next < requests.len() || !engine.is_idle() {
        while next < requests.len() && under < together {
            match engine.submit(requests[next].clone(), clock)? {
                Ok(id) => _ = places.insert(id, next),
                Err(refusal) => bail!("request {next} is refused: {refusal:?}"),
            }
            (next, under) = (next + 1, under + 1);
        }
        clock += 0.01;
        for event in engine.step(clock) {
            match event {
                Event::Token(id, token, reason) => {
                    answers[places[&id]].push(token);
                    under -= usize::from(reason.is_some());
                }
                other => bail!("{other:?}"),
            }
        }
    }
    Ok(answers)
}

/// What was found over some requests.
#[derive(Default)]
struct Row {
    requests: usize,
    same: usize,
    first: usize,
    tokens: usize,
    largest: f64,
    sum: f64,
    count: usize,
    trained: f64,
}

impl Row {
    /// Counts an answer that was computed together and alone.
    fn add(&mut self, a: &[Token], b: &[Token]) {
        self.requests += 1;
        self.same += usize::from(a.iter().map(|t| t.token).eq(b.iter().map(|t| t.token)));
        self.first += usize::from(a[0].token == b[0].token);
        for (a, b) in a.iter().zip(b) {
            let of: BTreeMap<u32, f32> = b.top.iter().copied().collect();
            for difference in a.top.iter().filter_map(|(token, p)| Some(f64::from((p - of.get(token)?).abs()))) {
                self.largest = self.largest.max(difference);
                (self.sum, self.count) = (self.sum + difference, self.count + 1);
            }
            if a.token != b.token {
                break;
            }
            self.tokens += 1;
        }
    }

    fn merge(&mut self, other: &Self) {
        self.requests += other.requests;
        self.same += other.same;
        self.first += other.first;
        self.tokens += other.tokens;
        self.largest = self.largest.max(other.largest);
        self.trained = self.trained.max(other.trained);
        (self.sum, self.count) = (self.sum + other.sum, self.count + other.count);
    }

    fn print(&self, name: &str) {
        let mean = self.sum / self.count.max(1) as f64;
        println!(
            "{name:<8} {:>9} {:>13} {:>12} {:>12} {mean:>12.1e} {:>12.1e} {:>13.1e}",
            self.requests, self.same, self.first, self.tokens, self.largest, self.trained
        );
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let base = load(&arguments.model, &arguments.dtype)?;
    let other = arguments.against.as_ref().filter(|a| **a != arguments.dtype);
    let other = other.map(|dtype| load(&arguments.model, dtype)).transpose()?;
    let against = other.as_ref().unwrap_or(&base);
    // What an adapter does depends on the base for some methods, so that it is made on the one that both answer for.
    let adapters = adapters(against)?;
    let mut hosted = Vec::new();
    for (name, adapter) in &adapters {
        hosted.push(Arc::new(Hosted::new(against.model(), adapter, name.clone(), None)?));
    }
    let texts = texts(&arguments.data)?;
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let mut requests = Vec::new();
    for i in 0..arguments.requests {
        let mut prompt = base.text.encode(&texts[rng.random_range(0..texts.len())], false)?.ids;
        prompt.truncate(rng.random_range(1..=100));
        // Every fifty-first asks the base.
        let chosen = hosted.get(i % (hosted.len() + 1)).map(|h| (h.clone(), 1.0));
        requests.push(Request {
            prompt,
            adapters: chosen.into_iter().collect(),
            max_tokens: Some(rng.random_range(1..=24)),
            sampling: Sampling::default(),
            seed: 0,
            stop: vec![],
            log_probabilities: Some(20),
            of_prompt: false,
            tenant: Default::default(),
            names: vec![],
            form: None,
        });
    }
    let together = run(&base, &requests, 32)?;
    eprintln!("{} requests answered together", requests.len());
    let alone = run(against, &requests, 1)?;
    // By method, the base last.
    let mut rows: Vec<Row> = (0..=METHODS.len()).map(|_| Row::default()).collect();
    let method = |i: usize| i % (adapters.len() + 1) / EACH as usize;
    for (i, (a, b)) in together.iter().zip(&alone).enumerate() {
        rows[method(i)].add(a, b);
    }
    // The code that trains, for the first request of each adapter.
    for (i, ((_, adapter), request)) in adapters.iter().zip(&requests).enumerate() {
        let attached = Attached::one(adapter);
        let batch = Batch::pack([request.prompt.as_slice()]);
        let h = against.model.hidden(&batch, &attached)?.narrow(0, request.prompt.len() - 1, 1)?;
        let logits = against.model.logits(&h, &attached)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let norm = logits.iter().map(|l| f64::from(l - most).exp()).sum::<f64>().ln() + f64::from(most);
        for (token, p) in &together[i][0].top {
            let difference = (f64::from(logits[*token as usize]) - norm - f64::from(*p)).abs();
            rows[method(i)].trained = rows[method(i)].trained.max(difference);
        }
    }
    let n = requests.len();
    println!(
        "{n} requests over {} adapters of {}: together in {}, alone in {}",
        adapters.len(),
        METHODS.join(", "),
        arguments.dtype,
        arguments.against.as_ref().unwrap_or(&arguments.dtype)
    );
    println!(
        "{:<8} {:>9} {:>13} {:>12} {:>12} {:>12} {:>12} {:>13}",
        "", "requests", "same answers", "same firsts", "tokens", "mean |Δ|", "largest |Δ|", "to training"
    );
    let mut all = Row::default();
    for (row, name) in rows.iter().zip(METHODS.iter().copied().chain(["base"])) {
        row.print(name);
        all.merge(row);
    }
    all.print("all");
    let same = all.same;
    if other.is_none() && same != n {
        bail!("{} answers differ", n - same);
    }
    Ok(())
}
