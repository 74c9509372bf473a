//! `lorimer bench embed`: texts to vectors, alone or in turns with a peer that gets the same texts.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use lorimer_cli::common::ModelArgs;
use lorimer_cli::pooling::PoolingArgs;
use lorimer_cli::{Global, common};
use lorimer_model::Frozen;
use lorimer_model::embed::embed;
use lorimer_model::files::{MAX_JSON_BYTES, read_bounded};
use serde_json::{Value, json};

use crate::measure::{answer, median, median_of};

/// Measure texts a second; measurements and peers alternate
#[derive(Args)]
pub struct BenchEmbed {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    pooling: PoolingArgs,
    /// Texts: a JSON list, an object with such a list as `sentences`, or lines
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Rounds; the median counts
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Texts of a batch of the peers'
    #[arg(long, default_value_t = 32)]
    peer_batch: usize,
    /// A command that embeds the same texts: it gets the model's folder, FILE and the texts of a batch as arguments and prints a JSON object with
    /// `sentences_per_second`; repeatable
    #[arg(long)]
    peer: Vec<String>,
}

fn read(path: &Path) -> Result<Vec<String>> {
    let text = String::from_utf8(read_bounded(path, MAX_JSON_BYTES)?).context("the texts are not UTF-8")?;
    let list = match serde_json::from_str(&text) {
        Ok(Value::Object(mut fields)) => fields.remove("sentences").unwrap_or_default(),
        Ok(value) => value,
        Err(_) => text.lines().collect(),
    };
    let texts: Option<Vec<String>> =
        list.as_array().and_then(|all| all.iter().map(|t| t.as_str().map(str::to_string)).collect());
    match texts {
        Some(texts) if !texts.is_empty() => Ok(texts),
        _ => bail!("`{}` holds no list of texts", path.display()),
    }
}

impl BenchEmbed {
    /// Does what was asked for and prints it.
    pub fn run(self, global: Global) -> Result<ExitCode> {
        let texts = read(&self.data)?;
        let (base, _) = common::open_base(&self.model, global)?;
        let options = self.pooling.options(&base)?;
        let (mut ours, mut theirs) = (Vec::new(), vec![Vec::new(); self.peer.len()]);
        embed(&base, &Frozen, &texts, &options)?;
        for _ in 0..self.rounds.max(1) {
            let clock = Instant::now();
            embed(&base, &Frozen, &texts, &options)?;
            ours.push(texts.len() as f64 / clock.elapsed().as_secs_f64());
            for (peer, found) in self.peer.iter().zip(&mut theirs) {
                let mut words = peer.split_whitespace();
                let mut command = Command::new(words.next().context("--peer is empty")?);
                command.args(words).arg(&base.path).arg(&self.data).arg(self.peer_batch.to_string());
                found.push(answer(command, &format!("the peer `{peer}`"))?);
            }
        }
        let own = median(ours.clone());
        let peers: Vec<Value> = theirs
            .iter()
            .map(|found| {
                let rate = median_of(found, "sentences_per_second");
                json!({ "name": found[0]["name"], "sentences_per_second": rate, "speed_ratio": own / rate })
            })
            .collect();
        let json = json!({
            "texts": texts.len(), "rounds": ours, "sentences_per_second": own,
            "threads": rayon::current_num_threads(), "peers": peers,
        });
        common::print(global, &json, || {
            let mut out =
                format!("lorimer: {own:.1} texts/s, the median of {} rounds of {}\n", ours.len(), texts.len());
            for peer in &peers {
                let number = |key: &str| peer[key].as_f64().unwrap_or(f64::NAN);
                out += &format!(
                    "{}: {:.1} texts/s; lorimer is {:.2} times as fast\n",
                    peer["name"].as_str().unwrap_or("peer"),
                    number("sentences_per_second"),
                    number("speed_ratio"),
                );
            }
            out
        })
    }
}
