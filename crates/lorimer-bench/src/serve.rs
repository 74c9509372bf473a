//! `lorimer bench serve`: the server as its clients see it, alone or against peers that get the same requests.

mod cold;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use candle_core::{Device, Tensor};
use clap::Args;
use lorimer_adapter::file::bytes::safetensors_bytes;
use lorimer_adapter::file::dialects::peft::tensor_name;
use lorimer_adapter::file::store::{CONFIG_FILE, WEIGHTS_FILE};
use lorimer_adapter::methods;
use lorimer_model::Config;
use lorimer_model::files::{create_folder, write_json};
use lorimer_serve::engine::workload::{Arrival, Workload};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

use lorimer_cli::Global;
use lorimer_cli::common::{self, ModelArgs, draws};

use crate::measure::answer;

/// Requests to a server of its own with adapters made for it: all at once (`burst`), or as S-LoRA's workload has them come (`trace`), for each
/// number of adapters. Every adapter is a LoRA with random factors on q, k, v and o; prompts are random tokens and share nothing
#[derive(Args)]
pub struct BenchServe {
    #[command(flatten)]
    model: ModelArgs,
    /// Numbers of adapters, a measurement each
    #[arg(long, value_delimiter = ',', default_value = "16")]
    adapters: Vec<usize>,
    /// Ranks, given to the adapters in turn
    #[arg(long, value_delimiter = ',', default_value = "8")]
    ranks: Vec<usize>,
    /// Let requests come as in S-LoRA's workload (gamma arrivals, power-law popularity) in place of all at once
    #[arg(long)]
    trace: bool,
    /// Requests that come at once; their adapters in turn
    #[arg(long, default_value_t = 16)]
    requests: usize,
    /// Prompt tokens: N, or LEAST-MOST of a uniform distribution; several of these, apart by commas, are taken in turn, as 128,1-2000
    #[arg(long, default_value = "128", value_delimiter = ',', value_parser = range)]
    input: Vec<(usize, usize)>,
    /// Tokens of an answer: N, or LEAST-MOST
    #[arg(long, default_value = "32", value_parser = range)]
    output: (usize, usize),
    /// Measure the time between two tokens of streams (--requests of them) beside so many requests of one token a second: for adapters that
    /// are at work, then for cold ones, each read from its files
    #[arg(long, value_name = "RATE", conflicts_with_all = ["trace", "peer"])]
    cold_loads: Option<f64>,
    /// With --trace: requests a second
    #[arg(long, default_value_t = 2.0)]
    rate: f64,
    /// With --trace: seconds in which they come
    #[arg(long, default_value_t = 60.0)]
    duration: f64,
    /// With --trace: exponent of the adapters' popularity (1: all alike)
    #[arg(long, default_value_t = 1.0)]
    alpha: f64,
    /// With --trace: coefficient of variation of the times between two requests
    #[arg(long, default_value_t = 1.0)]
    cv: f64,
    /// Measurements of each; medians are shown
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seed of adapters, prompts and arrivals
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Further flags of `lorimer serve`, as one text
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    serve: String,
    /// A command that does the same: it is given a JSON file (`adapters`: their folders; `requests`: `adapter`, `prompt`, `output`) and
    /// prints one JSON object with `name`, `seconds`, `output_tokens_per_second`, `peak_bytes`; repeatable, not with --trace
    #[arg(long, value_name = "COMMAND", conflicts_with = "trace")]
    peer: Vec<String>,
    /// Folder for the adapters [default: a temporary one]
    #[arg(long)]
    folder: Option<PathBuf>,
}

fn range(text: &str) -> Result<(usize, usize), String> {
    let number = |t: &str| t.trim().parse::<usize>().ok().filter(|&n| n > 0 && n < 1 << 20);
    let found = match text.split_once('-') {
        Some((least, most)) => number(least).zip(number(most)),
        None => number(text).map(|n| (n, n)),
    };
    found.filter(|(least, most)| least <= most).ok_or_else(|| format!("`{text}` should be N or LEAST-MOST, from 1"))
}

/// A request of a measurement.
#[derive(Clone)]
struct Ask {
    at: f64,
    adapter: usize,
    prompt: Vec<u32>,
    output: usize,
}

/// A server in a process of its own, which ends with this.
struct Server {
    child: Child,
    url: String,
}

impl Server {
    fn start(bench: &BenchServe, folder: &Path) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(["serve", "--port", "0", "--json", "--quiet", "--model", &bench.model.model, "--adapters"])
            .arg(folder);
        if let Some(dtype) = clap::ValueEnum::to_possible_value(&bench.model.dtype) {
            command.args(["--dtype", dtype.get_name()]);
        }
        if let Some(tokenizer) = &bench.model.tokenizer {
            command.arg("--tokenizer").arg(tokenizer);
        }
        command.args(bench.serve.split_whitespace()).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().context("cannot start the server")?;
        let mut line = String::new();
        let out = child.stdout.take().context("the server has no output")?;
        BufReader::new(out).read_line(&mut line)?;
        let said: Value =
            serde_json::from_str(&line).map_err(|_| anyhow!("the server did not start; its error stands above"))?;
        let url = said["url"].as_str().context("the server gave no address")?.to_string();
        Ok(Self { child, url })
    }

    fn peak_bytes(&self) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).ok()?;
        let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
        Some(line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? * 1024)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a client saw of one request.
struct Seen {
    whole: f64,
    tokens: usize,
}

/// Writes adapters `0 … n − 1` that are not there yet, each with factors of its own.
fn write_adapters(folder: &Path, config: &Config, n: usize, ranks: &[usize], seed: u64, global: Global) -> Result<()> {
    let bar = common::bar(n as u64, "writing adapters {bar:30} {pos}/{len} {eta}", global);
    let sites: Vec<_> = config
        .sites()
        .into_iter()
        .filter(|s| ["q_proj", "k_proj", "v_proj", "o_proj"].contains(&s.role.as_str()))
        .collect();
    for i in 0..n {
        bar.set_position(i as u64);
        let own = folder.join(name(i));
        if own.join(CONFIG_FILE).is_file() {
            continue;
        }
        let rank = ranks[i % ranks.len()];
        let mut settings = Map::new();
        settings.insert("r".into(), rank.into());
        settings.insert("target_modules".into(), json!(["q_proj", "k_proj", "v_proj", "o_proj"]));
        let config = methods::build("lora", &settings)?.stored_config();
        let mut rng = ChaCha8Rng::seed_from_u64(seed ^ (i as u64) << 20);
        let mut tensors = BTreeMap::new();
        for site in &sites {
            for (key, shape) in [("lora_A", (rank, site.inputs)), ("lora_B", (site.outputs, rank))] {
                let numbers: Vec<f32> = (0..shape.0 * shape.1).map(|_| rng.random_range(-0.02..0.02)).collect();
                let tensor = Tensor::from_vec(numbers, shape, &Device::Cpu)?;
                tensors.insert(tensor_name(&site.path, &format!("{key}.weight")), tensor);
            }
        }
        create_folder(&own)?;
        std::fs::write(own.join(WEIGHTS_FILE), safetensors_bytes(&tensors)?)?;
        std::fs::write(own.join(CONFIG_FILE), serde_json::to_vec(&config)?)?;
    }
    bar.finish_and_clear();
    Ok(())
}

fn name(adapter: usize) -> String {
    format!("a{adapter}")
}

impl BenchServe {
    /// The requests of a measurement.
    fn asks(&self, adapters: usize, vocabulary: usize, round: usize) -> Result<Vec<Ask>> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed ^ 0x5eed ^ (round as u64) << 32);
        let arrivals = match self.trace {
            true => {
                let workload = Workload {
                    adapters,
                    alpha: self.alpha,
                    rate: self.rate,
                    cv: self.cv,
                    duration: self.duration,
                    input: self.input[0],
                    output: self.output,
                    ranks: self.ranks.clone(),
                    seed: self.seed,
                };
                workload.arrivals().map_err(|e| anyhow!(e))?
            }
            false => (0..self.requests)
                .map(|i| Arrival {
                    at: 0.0,
                    adapter: i % if self.cold_loads.is_some() { self.requests } else { adapters },
                    input: self.input[0].0,
                    output: rng.random_range(self.output.0..=self.output.1),
                })
                .collect(),
        };
        let ask = |(i, a): (usize, Arrival)| {
            let (least, most) = self.input[i % self.input.len()];
            let input = if self.trace && self.input.len() == 1 { a.input } else { rng.random_range(least..=most) };
            Ask {
                at: a.at,
                adapter: a.adapter,
                prompt: (0..input).map(|_| rng.random_range(3..vocabulary as u32)).collect(),
                output: a.output,
            }
        };
        Ok(arrivals.into_iter().enumerate().map(ask).collect())
    }

    /// Measures and prints.
    pub fn run(self, global: Global) -> Result<ExitCode> {
        if self.rounds == 0 || self.requests == 0 || self.adapters.contains(&0) || self.ranks.contains(&0) {
            bail!("--rounds, --requests, --adapters and --ranks should be at least 1");
        }
        if self.cold_loads.is_some_and(|rate| !(rate.is_finite() && rate > 0.0)) {
            bail!("--cold-loads should be above 0");
        }
        let (prepared, _) = common::prepare_base(&self.model, global)?;
        let config = prepared.config.clone();
        drop(prepared);
        let longest = self.input.iter().map(|(_, most)| most).max().copied().unwrap_or(0) + self.output.1;
        if longest > config.shape().max_positions {
            let context = config.shape().max_positions;
            bail!(
                "--input and --output are {longest} tokens at most, and the model is made for {context}; ask for fewer"
            );
        }
        let most = self.adapters.iter().copied().max().unwrap_or(1);
        let own = self.folder.is_none();
        let folder = self
            .folder
            .clone()
            .unwrap_or_else(|| std::env::temp_dir().join(format!("lorimer-bench-{}", std::process::id())));
        create_folder(&folder)?;
        let measured = self.measure(&folder, &config, most, global);
        if own {
            let _ = std::fs::remove_dir_all(&folder);
        }
        let (rows, peers) = measured?;
        let machine = json!({
            "threads": rayon::current_num_threads(),
            "os": std::env::consts::OS, "arch": std::env::consts::ARCH,
        });
        common::print(global, &json!({ "rows": rows, "machine": machine, "peers": peers }), || {
            table(self.cold_loads.is_some(), rows.iter().chain(&peers))
        })
    }

    fn measure(&self, folder: &Path, config: &Config, most: usize, global: Global) -> Result<(Vec<Value>, Vec<Value>)> {
        write_adapters(folder, config, most, &self.ranks, self.seed, global)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mut found: Vec<Vec<Value>> = vec![Vec::new(); self.adapters.len() + self.peer.len()];
        // In turns, so that what else the machine does meets all alike.
        for round in 0..self.rounds {
            for (place, &adapters) in self.adapters.iter().enumerate() {
                let asks = self.asks(adapters, config.shape().vocabulary, round)?;
                let server = Server::start(self, folder)?;
                let row = match self.cold_loads {
                    Some(rate) => runtime.block_on(self.cold(&server, asks, adapters, rate))?,
                    None => runtime.block_on(self.ask(&server, asks, adapters, global))?,
                };
                found[place].push(row);
            }
            for (place, peer) in self.peer.iter().enumerate() {
                let adapters = self.adapters[0];
                let asks = self.asks(adapters, config.shape().vocabulary, round)?;
                let requests: Vec<Value> = asks
                    .iter()
                    .map(|a| json!({ "adapter": a.adapter, "prompt": a.prompt, "output": a.output }))
                    .collect();
                let folders: Vec<PathBuf> = (0..adapters).map(|i| folder.join(name(i))).collect();
                let path = folder.join("requests.json");
                write_json(&path, &json!({ "adapters": folders, "requests": requests }))?;
                let mut words = peer.split_whitespace();
                let mut command = Command::new(words.next().context("--peer is empty")?);
                command.args(words).arg(&path);
                let mut row = answer(command, &format!("the peer `{peer}`"))?;
                row["adapters"] = adapters.into();
                row["requests"] = asks.len().into();
                found[self.adapters.len() + place].push(row);
            }
        }
        let mut rows: Vec<Value> = found.into_iter().map(median).collect();
        let peers = rows.split_off(self.adapters.len());
        Ok((rows, peers))
    }

    /// Sends the requests and measures from the first to the last answer.
    async fn ask(&self, server: &Server, asks: Vec<Ask>, adapters: usize, global: Global) -> Result<Value> {
        let client = lorimer_model::http::client().no_proxy().pool_max_idle_per_host(64).build()?;
        let url = Arc::new(format!("{}/v1/completions", server.url));
        let body = |a: &Ask, output: usize| {
            json!({
                "model": name(a.adapter), "prompt": a.prompt, "max_tokens": output, "temperature": 0, "ignore_eos": true,
                "user": "bench",
            })
        };
        if !self.trace {
            // What is loaded once only (adapters, memory) is not part of a burst.
            let mut seen = std::collections::HashSet::new();
            for ask in asks.iter().filter(|a| seen.insert(a.adapter)) {
                let warm = Ask { prompt: vec![1, 2, 3], adapter: ask.adapter, at: 0.0, output: 1 };
                send(&client, &url, &body(&warm, 1)).await?;
            }
        }
        let bar = common::bar(asks.len() as u64, "answers {bar:30} {pos}/{len} {eta}", global);
        let (clock, n) = (Instant::now(), asks.len());
        let mut tasks = tokio::task::JoinSet::new();
        for ask in asks {
            let (client, url, body) = (client.clone(), url.clone(), body(&ask, ask.output));
            tasks.spawn(async move {
                tokio::time::sleep_until((clock + Duration::from_secs_f64(ask.at)).into()).await;
                let begun = Instant::now();
                let tokens = send(&client, &url, &body).await?;
                anyhow::Ok(Seen { whole: begun.elapsed().as_secs_f64(), tokens })
            });
        }
        let mut seen = Vec::new();
        while let Some(one) = tasks.join_next().await {
            seen.push(one??);
            bar.inc(1);
        }
        bar.finish_and_clear();
        let seconds = clock.elapsed().as_secs_f64();
        let tokens: usize = seen.iter().map(|s| s.tokens).sum();
        let mut latencies: Vec<f64> = seen.iter().map(|s| s.whole).collect();
        latencies.sort_by(f64::total_cmp);
        let state: Value = client.get(format!("{}/v1/state", server.url)).send().await?.json().await?;
        if draws(global) {
            tracing::info!("{adapters} adapters: {n} requests in {seconds:.1} s");
        }
        Ok(json!({
            "name": "lorimer", "adapters": adapters, "requests": n, "seconds": seconds,
            "requests_per_second": n as f64 / seconds,
            "output_tokens_per_second": tokens as f64 / seconds,
            "latency": latencies.iter().sum::<f64>() / n.max(1) as f64,
            "latency_p99": latencies[((n as f64 * 0.99).ceil() as usize).clamp(1, n.max(1)) - 1],
            "adapter_loads": state["figures"]["engine"]["adapter_loads"],
            "peak_bytes": server.peak_bytes(),
        }))
    }
}

/// Sends one request; the tokens of its answer.
async fn send(client: &reqwest::Client, url: &str, body: &Value) -> Result<usize> {
    let response = client.post(url).json(body).send().await?;
    let status = response.status();
    let answer: Value = response.json().await?;
    if !status.is_success() {
        bail!("the server answers {status}: {}", answer["error"]["message"].as_str().unwrap_or_default());
    }
    answer["usage"]["completion_tokens"].as_u64().map(|n| n as usize).context("the answer tells no tokens")
}

/// A column of the table: its heading, the field shown, and digits after the point.
type Column = (&'static str, &'static str, usize);

const COLUMNS: [Column; 6] = [
    ("adapters", "adapters", 0),
    ("requests", "requests", 0),
    ("requests/s", "requests_per_second", 2),
    ("out tokens/s", "output_tokens_per_second", 1),
    ("latency, s", "latency", 2),
    ("p99, s", "latency_p99", 2),
];

const COLD_COLUMNS: [Column; 8] = [
    ("loads/s", "loads_per_second", 1),
    ("load p50, s", "load_p50", 3),
    ("load p99, s", "load_p99", 3),
    ("gap p50, s", "gap_p50", 4),
    ("gap p99, s", "gap_p99", 4),
    ("p50 cold", "gap_p50_while_loading", 4),
    ("p99 cold", "gap_p99_while_loading", 4),
    ("p99 ratio", "p99_ratio", 2),
];

/// The rows for people.
fn table<'a>(cold: bool, rows: impl Iterator<Item = &'a Value>) -> String {
    let columns: &[Column] = if cold { &COLD_COLUMNS } else { &COLUMNS };
    let heads: String = columns.iter().map(|(head, ..)| format!(" {head:>12}")).collect();
    let mut out = format!("{:<26}{heads}{}", "", if cold { "" } else { "      peak" });
    for row in rows {
        out += &format!("\n{:<26}", row["name"].as_str().unwrap_or_default());
        for (_, field, digits) in columns {
            let number = row[field].as_f64().map_or("-".into(), |v| format!("{v:.digits$}"));
            out += &format!(" {number:>12}");
        }
        if !cold {
            let peak = row["peak_bytes"].as_f64().map_or("-".into(), |b| lorimer_cli::flags::show_bytes(b as u64));
            out += &format!(" {peak:>9}");
        }
    }
    out
}

/// The row in the middle by tokens a second.
fn median(mut rows: Vec<Value>) -> Value {
    let key = |row: &Value| row["output_tokens_per_second"].as_f64().unwrap_or(0.0);
    rows.sort_by(|a, b| key(a).total_cmp(&key(b)));
    let rates: Vec<f64> = rows.iter().map(key).collect();
    let at = rows.len() / 2;
    let mut row = rows.swap_remove(at);
    row["rounds_output_tokens_per_second"] = rates.into();
    row
}
