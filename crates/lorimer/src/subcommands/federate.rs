//! `lorimer federate`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use lorimer::adapter::methods::from_adapter_config;
use lorimer::adapter::training::AdamWConfig;
use lorimer::adapter::{Adapter, StoredAdapter};
use lorimer::train::data::Format;
use lorimer::train::federate::privacy::{Privacy, epsilon, private};
use lorimer::train::federate::simulate::{Client, Entry, Federation, Told, client_seed};
use lorimer::train::federate::split::{Split, split};
use lorimer::train::federate::{Aggregate, shares};
use lorimer::train::{EncodeOptions, Example, TrainSettings};
use serde_json::{Map, Value, json};

use lorimer_cli::common::{ModelArgs, bar};
use lorimer_cli::flags::names;
use lorimer_cli::{Global, common, host};

/// Train one adapter with many clients that keep their rows and send adapters (FLoRA)
#[derive(Args)]
pub struct Federate {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// All clients and the server in one process, one after the other
    Simulate(Box<Simulate>),
    /// Clip what an adapter has changed since it began, and add noise: what a client may send
    Private(Private),
    /// The seed of a client in a round
    #[command(hide = true)]
    Seed(Seed),
}

/// Clip what an adapter has changed since it began, and add noise
#[derive(Args)]
struct Private {
    #[command(flatten)]
    model: ModelArgs,
    /// Adapter folder, trained anew by Lorimer: its start follows from its seed
    #[arg(long)]
    adapter: PathBuf,
    /// Largest norm of the change of all factors together
    #[arg(long, value_name = "NORM")]
    clip: f64,
    /// Gaussian noise of every number, in parts of --clip
    #[arg(long, value_name = "MULTIPLIER")]
    noise: f64,
    /// Seed of the noise, for tests: noise that can be drawn again hides nothing [default: the system's random numbers]
    #[arg(long)]
    noise_seed: Option<u64>,
    /// Where to write
    #[arg(long, short)]
    output: PathBuf,
}

#[derive(Args)]
struct Seed {
    #[arg(long)]
    seed: u64,
    #[arg(long)]
    round: usize,
    #[arg(long)]
    client: String,
}

impl Private {
    fn run(self, global: Global) -> Result<ExitCode> {
        let privacy = Privacy { clip: self.clip, noise: self.noise };
        privacy.check()?;
        let stored = StoredAdapter::read(&self.adapter)?;
        let training = stored.manifest.as_ref().map(|m| m.training.clone()).unwrap_or_default();
        let Some(seed) = training["settings"]["seed"].as_u64() else {
            bail!(
                "`{}` does not say which seed it began with; only adapters that Lorimer trained do",
                self.adapter.display()
            );
        };
        let (base, pulled) = common::open_shared(&self.model, global)?;
        common::attach(&base, &stored)?;
        let method = from_adapter_config(&stored.config)?;
        let start = Adapter::attach(base.model(), method, seed)?.to_stored(&pulled.name)?;
        let noise_seed = self.noise_seed.unwrap_or_else(rand::random);
        let sent = private(&stored, &start, privacy, noise_seed)?;
        sent.write(&self.output, None)?;
        let json = json!({ "output": self.output, "content_id": sent.content_id()? });
        common::print(global, &json, || format!("wrote {}", self.output.display()))
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum AggregateFlag {
    /// FLoRA: factors one under the other, exact at any ranks
    Stack,
    /// FedIT: the mean of the factors, of one rank, which clients go on from
    Fedavg,
    /// The mean of factors filled up with zeros to the largest rank
    ZeroPad,
}

/// All clients and the server in one process. The output holds `global`, an adapter that every tool reads, each round's adapters and `ledger.jsonl`:
/// who brought what, bytes up and down, losses
#[derive(Args)]
pub struct Simulate {
    #[command(flatten)]
    model: ModelArgs,
    /// Rows: one file that is shared out by --split, or a file for each client
    #[arg(long, required = true, help_heading = "Data")]
    data: Vec<PathBuf>,
    /// Rows that the global adapter is measured on after each round; repeatable
    #[arg(long, help_heading = "Data")]
    eval_data: Vec<PathBuf>,
    /// Clients that one file is shared out to
    #[arg(long, help_heading = "Data")]
    clients: Option<usize>,
    /// How one file is shared out: iid, dirichlet:CONCENTRATION or shards:COUNT, the last two by answers
    #[arg(long, default_value = "iid", help_heading = "Data")]
    split: Split,
    /// Fewest rows of a client
    #[arg(long, default_value_t = 8, help_heading = "Data")]
    least_rows: usize,
    /// Only the first rows of each file
    #[arg(long, help_heading = "Data")]
    limit: Option<usize>,
    /// Longest sequence in tokens
    #[arg(long, default_value_t = 512, help_heading = "Data")]
    max_length: usize,
    /// Form of the rows [default: told by the keys]
    #[arg(long, help_heading = "Data")]
    format: Option<Format>,
    /// Learn the prompts too, not only the answers
    #[arg(long, help_heading = "Data")]
    train_on_prompt: bool,

    /// Rounds
    #[arg(long, default_value_t = 3, help_heading = "Federation")]
    rounds: usize,
    /// Share of the clients that take part in a round
    #[arg(long, default_value_t = 1.0, help_heading = "Federation")]
    fraction: f64,
    /// How adapters become one
    #[arg(long, value_enum, default_value = "stack", help_heading = "Federation")]
    aggregate: AggregateFlag,
    /// Share of each module's squared singular values that the global adapter keeps after a round [default: all, exactly]
    #[arg(long, value_name = "SHARE", help_heading = "Federation")]
    energy: Option<f64>,
    /// Largest norm of what a client has changed of its factors together, before they are sent
    #[arg(long, value_name = "NORM", help_heading = "Federation")]
    clip: Option<f64>,
    /// Gaussian noise that a client adds to every number that it sends, in parts of --clip
    #[arg(long, value_name = "MULTIPLIER", requires = "clip", help_heading = "Federation")]
    noise: Option<f64>,
    /// The delta that the privacy loss is told for
    #[arg(long, default_value_t = 1e-5, help_heading = "Federation")]
    delta: f64,

    /// Ranks of the clients in turn; alpha is twice the rank
    #[arg(long, value_delimiter = ',', default_value = "16", help_heading = "Adapter")]
    ranks: Vec<usize>,
    /// all-linear, a list (q_proj,v_proj) or a regular expression over the whole path
    #[arg(long, default_value = "q_proj,v_proj", help_heading = "Adapter")]
    target_modules: String,
    /// Dropout before the adapter, in training
    #[arg(long, default_value_t = 0.05, help_heading = "Adapter")]
    dropout: f64,

    /// Highest learning rate; it falls to zero in each round
    #[arg(long, default_value_t = 3e-4, help_heading = "Training")]
    lr: f64,
    /// Passes over a client's rows in a round
    #[arg(long, default_value_t = 1.0, help_heading = "Training")]
    epochs: f64,
    /// Optimiser steps of a client in a round, in place of --epochs
    #[arg(long, help_heading = "Training")]
    max_steps: Option<usize>,
    /// Rows in one forward and backward
    #[arg(long, default_value_t = 16, help_heading = "Training")]
    batch_size: usize,
    /// Forwards and backwards in one step
    #[arg(long, default_value_t = 1, help_heading = "Training")]
    gradient_accumulation: usize,
    /// Seed of starts, data order, the split and noise
    #[arg(long, default_value_t = 0, help_heading = "Training")]
    seed: u64,

    /// Folder for everything
    #[arg(long, short, default_value = "runs/federation", help_heading = "Output")]
    output: PathBuf,
    /// Go on where an interrupted federation stopped, to the same bytes
    #[arg(long, help_heading = "Output")]
    resume: bool,
}

impl Federate {
    pub fn run(self, global: Global) -> Result<ExitCode> {
        match self.what {
            What::Simulate(simulate) => simulate.run(global),
            What::Private(private) => private.run(global),
            What::Seed(Seed { seed, round, client }) => {
                let seed = client_seed(seed, round, &client);
                common::print(global, &json!({ "seed": seed }), || seed.to_string())
            }
        }
    }
}

impl Simulate {
    fn run(self, global: Global) -> Result<ExitCode> {
        if self.noise.is_none() && self.clip.is_some() {
            bail!("--clip alone gives no privacy; pass --noise too (0 for none)");
        }
        if !(self.delta > 0.0 && self.delta < 1.0) {
            bail!("--delta {} should be between 0 and 1", self.delta);
        }
        let settings = self.settings();
        settings.check()?;
        let (base, pulled) = common::open_shared(&self.model, global)?;
        base.config.decoder("`lorimer federate`")?;
        let options = EncodeOptions {
            format: self.format,
            max_length: self.max_length,
            train_on_prompt: self.train_on_prompt,
            limit: self.limit,
            ..Default::default()
        };
        let read = |path: &PathBuf| Ok(common::load_data(path, &base.text, &options)?.0);
        let files = self.data.iter().map(read).collect::<Result<Vec<_>>>()?;
        let unlimited = EncodeOptions { limit: None, ..options.clone() };
        let eval = self.eval_data.iter().map(|path| Ok(common::load_data(path, &base.text, &unlimited)?.0));
        let eval: Vec<Example> = eval.collect::<Result<Vec<_>>>()?.concat();
        let clients = self.clients_of(files)?;
        let stop = common::stop_flag();
        let federation = Federation {
            base: &base,
            base_name: &pulled.name,
            clients: &clients,
            eval: &eval,
            settings,
            rounds: self.rounds,
            fraction: self.fraction,
            aggregate: match self.aggregate {
                AggregateFlag::Stack => Aggregate::Stack,
                AggregateFlag::Fedavg => Aggregate::Fedavg,
                AggregateFlag::ZeroPad => Aggregate::ZeroPad,
            },
            energy: self.energy,
            privacy: self.clip.zip(self.noise).map(|(clip, noise)| Privacy { clip, noise }),
            output: self.output.clone(),
            resume: self.resume,
            stop: &stop,
        };
        let ledger = federation.run(progress(global, self.rounds * clients.len()))?;
        let Some(ledger) = ledger else {
            return Ok(common::interrupted("interrupted; the same command with --resume goes on from there"));
        };
        let loss = self.noise.map(|noise| epsilon(self.rounds, noise, self.delta)).filter(|e| e.is_finite());
        let up: usize = ledger.iter().flat_map(|e| &e.clients).map(|c| c.up_bytes).sum();
        let down: usize = ledger.iter().map(|e| e.down_bytes * e.clients.len()).sum();
        let json = json!({
            "adapter": self.output.join("global"), "rounds": ledger, "up_bytes": up, "down_bytes": down,
            "epsilon": loss, "delta": self.noise.map(|_| self.delta),
        });
        common::print(global, &json, || {
            let mut out = format!("adapter  {}\n", self.output.join("global").display());
            for entry in &ledger {
                out += &shown(entry);
            }
            out += &format!("sent     {:.2} MB up, {:.2} MB down\n", up as f64 / 1e6, down as f64 / 1e6);
            if self.noise.is_some() {
                out += &match loss {
                    Some(loss) => {
                        format!("privacy  epsilon {loss:.2} at delta {:e} for all the rows of one client\n", self.delta)
                    }
                    None => "privacy  none: the noise is too small for any bound\n".to_string(),
                };
            }
            out
        })
    }

    fn settings(&self) -> TrainSettings {
        TrainSettings {
            learning_rate: self.lr,
            epochs: self.epochs,
            max_steps: self.max_steps,
            batch_size: self.batch_size,
            gradient_accumulation: self.gradient_accumulation,
            adamw: AdamWConfig { weight_decay: 0.0, ..Default::default() },
            seed: self.seed,
            ..Default::default()
        }
    }

    /// The clients with their rows and ranks.
    fn clients_of(&self, mut files: Vec<Vec<Example>>) -> Result<Vec<Client>> {
        let rows: Vec<(String, Vec<Example>)> = match (files.len(), self.clients) {
            (1, Some(clients)) => {
                let all = files.remove(0);
                let answers: Vec<Option<&str>> = all.iter().map(|row| row.answer.as_deref()).collect();
                let shared = split(&answers, clients, self.split, self.least_rows, self.seed)?;
                let named = shared.into_iter().enumerate();
                named
                    .map(|(k, rows)| (format!("client_{k}"), rows.into_iter().map(|r| all[r].clone()).collect()))
                    .collect()
            }
            (1, None) => bail!("--clients says how many clients the one file is shared out to"),
            (_, Some(_)) => bail!("--clients shares out one file; with several files each is a client's"),
            _ => files.into_iter().enumerate().map(|(k, rows)| (format!("client_{k}"), rows)).collect(),
        };
        let ranks = self.ranks.iter().cycle();
        let client = |((name, rows), rank): ((String, Vec<Example>), &usize)| {
            let method = Map::from_iter([
                ("r".to_string(), json!(rank)),
                ("lora_alpha".to_string(), json!(2 * rank)),
                ("lora_dropout".to_string(), json!(self.dropout)),
                ("target_modules".to_string(), names(&self.target_modules)),
            ]);
            lorimer::adapter::methods::build("lora", &method)?;
            Ok(Client { name, rows, method })
        };
        let clients = rows.into_iter().zip(ranks).map(client).collect::<Result<Vec<_>>>()?;
        let counts: Vec<usize> = clients.iter().map(|c| c.rows.len()).collect();
        for ((client, share), rank) in clients.iter().zip(shares(&counts)).zip(self.ranks.iter().cycle()) {
            tracing::info!("{}: {} rows, {:.1} % of all, rank {rank}", client.name, client.rows.len(), 100.0 * share);
        }
        Ok(clients)
    }
}

fn shown(entry: &Entry) -> String {
    let mut out = format!("round {}  {} clients, rank {}", entry.round, entry.clients.len(), entry.rank);
    if let Some(loss) = entry.loss {
        out += &format!(", loss {loss:.4}");
    }
    if let Some(accuracy) = entry.choice_accuracy {
        out += &format!(", choice accuracy {:.1} %", 100.0 * accuracy);
    }
    if let Some(error) = entry.error.filter(|error| *error > 1e-6) {
        out += &format!("; the update is {:.1} % of the clients' weighted sum away from it", 100.0 * error);
    }
    out + "\n"
}

/// Shows how far it is.
fn progress(global: Global, all: usize) -> impl FnMut(Told<'_>) {
    let bar = bar(all as u64, "{bar:24} {pos}/{len} clients' rounds, now {msg}  {eta} left", global);
    let mut begun = 0u64;
    move |told| match told {
        Told::Client(round, name) => {
            bar.set_position(begun);
            bar.set_message(format!("round {round}, {name}"));
            host::tell(|| json!({ "kind": "client", "step": begun, "total": all, "round": round, "client": name }));
            begun += 1;
        }
        Told::Training(_) => {}
        Told::Round(entry) => {
            host::tell(|| {
                let mut value = serde_json::to_value(entry).unwrap_or(Value::Null);
                value["kind"] = "round".into();
                value["step"] = begun.into();
                value["total"] = all.into();
                value
            });
            bar.suspend(|| tracing::info!("{}", shown(entry).trim_end()));
        }
    }
}
