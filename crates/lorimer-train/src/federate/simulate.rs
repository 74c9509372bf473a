//! All clients and the server in one process, one after the other.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use lorimer_adapter::algebra::combine::{Request, combine};
use lorimer_adapter::file::store::CONFIG_FILE;
use lorimer_adapter::step::site_seed;
use lorimer_adapter::{Adapter, Attached, Method, StoredAdapter};
use lorimer_model::Base;
use lorimer_model::files::{create_folder, read_bounded, read_json, write_atomic, write_json};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::data::encode::Example;
use crate::error::{Error, Result};
use crate::federate::privacy::{Privacy, private};
use crate::federate::{Aggregate, shares};
use crate::run::beneath::Beneath;
use crate::run::evaluate::{Evaluation, evaluate, find_choices};
use crate::run::log::{LOG_FILE, Record};
use crate::run::session::Session;
use crate::run::trainer::{Event, TrainSettings};

/// A client: its rows and what it can afford.
pub struct Client {
    /// Its name.
    pub name: String,
    /// Its rows.
    pub rows: Vec<Example>,
    /// Settings of its method, in PEFT's keys.
    pub method: Map<String, Value>,
}

/// A federation.
pub struct Federation<'a> {
    /// The base.
    pub base: &'a Base,
    /// Hub id or path that adapters' configurations name.
    pub base_name: &'a str,
    /// The clients.
    pub clients: &'a [Client],
    /// Rows that the global adapter is measured on after each round; may be empty.
    pub eval: &'a [Example],
    /// How each client trains in a round.
    pub settings: TrainSettings,
    /// Rounds.
    pub rounds: usize,
    /// Share of the clients that take part in a round.
    pub fraction: f64,
    /// How adapters become one.
    pub aggregate: Aggregate,
    /// Share of the squared singular values that the global adapter keeps after each round; None for all, exactly.
    pub energy: Option<f64>,
    /// What clients do before they send.
    pub privacy: Option<Privacy>,
    /// Where everything goes.
    pub output: PathBuf,
    /// Go on where an interrupted run stopped.
    pub resume: bool,
    /// Set from outside to stop after the step.
    pub stop: &'a AtomicBool,
}

/// What a client brought to a round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Contribution {
    /// Its name.
    pub client: String,
    /// Its rows.
    pub rows: usize,
    /// Its share.
    pub weight: f64,
    /// `sha256:…` of what it sent.
    pub content_id: String,
    /// Bytes that it sent: four for each number of its factors.
    pub up_bytes: usize,
    /// Its last training loss.
    pub loss: Option<f64>,
}

/// A line of `ledger.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// The round, from 1.
    pub round: usize,
    /// Who brought what.
    pub clients: Vec<Contribution>,
    /// Bytes that each client was sent: four for each number of the round's factors.
    pub down_bytes: usize,
    /// The global adapter's largest rank.
    pub rank: usize,
    /// The part of the update that the combination leaves out or adds, ‖ΔW' − Σ pₖΔWₖ‖ / ‖Σ pₖΔWₖ‖.
    pub error: Option<f64>,
    /// The global adapter on the evaluation rows.
    pub loss: Option<f64>,
    /// The same where answers are few.
    pub choice_accuracy: Option<f64>,
}

/// What a federation's progress is told by.
pub enum Told<'a> {
    /// A client begins in a round.
    Client(usize, &'a str),
    /// Its training.
    Training(Event<'a>),
    /// A round is over.
    Round(&'a Entry),
}

/// Files in the output.
pub const LEDGER: &str = "ledger.jsonl";
const SETTINGS: &str = "federate.json";

impl Federation<'_> {
    /// Runs all rounds; None where it was stopped. The output then has `global`, the adapter of all rounds, `round_N` and the ledger.
    ///
    /// # Errors
    ///
    /// Fails if the settings do not fit each other or what the output holds, if training breaks down, or if a file cannot be read or written.
    pub fn run(&self, mut tell: impl FnMut(Told<'_>)) -> Result<Option<Vec<Entry>>> {
        self.check()?;
        let mut ledger: Vec<Entry> = Vec::new();
        for round in 1..=self.rounds {
            let folder = self.output.join(format!("round_{round}"));
            let entry_path = folder.join("entry.json");
            if !entry_path.is_file() {
                let before = (round > 1).then(|| self.output.join(format!("round_{}", round - 1)).join("global"));
                match self.round(round, &folder, before.as_deref(), &mut tell)? {
                    None => return Ok(None),
                    Some(entry) => write_json(&entry_path, &entry)?,
                }
            }
            let entry: Entry = read_json(&entry_path, 64 << 20)?;
            tell(Told::Round(&entry));
            ledger.push(entry);
        }
        let mut lines = Vec::new();
        for entry in &ledger {
            lines.extend(serde_json::to_vec(entry).map_err(|e| Error::Settings(e.to_string()))?);
            lines.push(b'\n');
        }
        write_atomic(&self.output.join(LEDGER), &lines)?;
        let last = self.output.join(format!("round_{}", self.rounds)).join("global");
        StoredAdapter::read(&last)?.write(&self.output.join("global"), None)?;
        Ok(Some(ledger))
    }

    fn check(&self) -> Result<()> {
        let fail = |text: String| Err(Error::Settings(text));
        self.settings.check()?;
        if self.clients.is_empty() || self.rounds == 0 {
            return fail("a federation has at least one client and one round".into());
        }
        if !(self.fraction > 0.0 && self.fraction <= 1.0) {
            return fail(format!(
                "the share of clients in a round, {}, should be above 0 and at most 1",
                self.fraction
            ));
        }
        if let Some(energy) = self.energy.filter(|e| !(*e > 0.0 && *e <= 1.0)) {
            return fail(format!("the energy that is kept, {energy}, should be above 0 and at most 1"));
        }
        if let Some(privacy) = self.privacy {
            privacy.check()?;
        }
        if self.aggregate.carries() && self.clients.iter().any(|c| c.method != self.clients[0].method) {
            return fail(
                "fedavg averages factors of one rank; give all clients the same, or use stack or zero-pad".into(),
            );
        }
        if self.aggregate.carries() && self.energy.is_some() {
            return fail("fedavg's adapter does not grow, so there is nothing to resize".into());
        }
        create_folder(&self.output)?;
        let clients: Vec<Value> =
            self.clients.iter().map(|c| json!({ "name": c.name, "rows": c.rows.len(), "method": c.method })).collect();
        let own = json!({
            "base": self.base.fingerprint, "clients": clients, "settings": self.settings, "rounds": self.rounds, "fraction": self.fraction,
            "aggregate": self.aggregate, "energy": self.energy, "privacy": self.privacy,
        });
        let path = self.output.join(SETTINGS);
        if path.is_file() {
            if !self.resume {
                return fail(format!(
                    "`{}` already holds a federation; pass --resume to go on with it, or choose another --output",
                    self.output.display()
                ));
            }
            let there: Value = read_json(&path, 64 << 20)?;
            if there != own {
                return fail(format!("`{}` was begun with other settings, clients or rounds", path.display()));
            }
        }
        write_json(&path, &own)?;
        Ok(())
    }

    /// Who takes part in a round.
    fn chosen(&self, round: usize) -> Vec<usize> {
        let mut all: Vec<usize> = (0..self.clients.len()).collect();
        let count = (self.fraction * all.len() as f64).ceil() as usize;
        if count < all.len() {
            all.shuffle(&mut ChaCha8Rng::seed_from_u64(site_seed(self.settings.seed, &format!("round {round}"))));
            all.truncate(count.max(1));
            all.sort_unstable();
        }
        all
    }

    fn round(
        &self,
        round: usize,
        folder: &Path,
        before: Option<&Path>,
        tell: &mut impl FnMut(Told<'_>),
    ) -> Result<Option<Entry>> {
        let mut sent = Vec::new();
        let mut clients = Vec::new();
        for client in self.chosen(round).into_iter().map(|k| &self.clients[k]) {
            tell(Told::Client(round, &client.name));
            let own = folder.join(&client.name);
            let Some(loss) = self.client(round, client, &own, before, tell)? else { return Ok(None) };
            let upload = match self.privacy {
                None => own,
                Some(privacy) => self.private(round, client, &own, before, privacy)?,
            };
            let stored = StoredAdapter::read(&upload)?;
            clients.push(Contribution {
                client: client.name.clone(),
                rows: client.rows.len(),
                weight: 0.0,
                content_id: stored.content_id()?,
                up_bytes: bytes_of(&stored),
                loss,
            });
            sent.push(upload);
        }
        let weights = shares(&clients.iter().map(|c| c.rows).collect::<Vec<_>>());
        clients.iter_mut().zip(&weights).for_each(|(client, weight)| client.weight = *weight);
        let adapters: Vec<_> = sent.into_iter().zip(weights.into_iter().map(Some)).collect();
        let update = folder.join("update");
        let made = self.combine(&adapters, self.aggregate.combination(), &Map::new(), &update)?;
        let global = folder.join("global");
        let sum = match (before, self.aggregate.carries()) {
            (Some(before), false) => {
                vec![(before.to_path_buf(), Some(1.0)), (update.clone(), Some(1.0))]
            }
            _ => vec![(update.clone(), Some(1.0))],
        };
        match (self.energy, self.aggregate.carries()) {
            (_, true) => StoredAdapter::read(&update)?.write(&global, None)?,
            (None, _) => _ = self.combine(&sum, "cat", &Map::new(), &global)?,
            (Some(energy), _) => {
                let settings = Map::from_iter([("energy".to_string(), json!(energy))]);
                self.combine(&sum, "compress", &settings, &global)?;
            }
        }
        let measured = self.measured(&global)?;
        let rank = lorimer_adapter::file::inspect::inspect(&StoredAdapter::read(&global)?)?;
        Ok(Some(Entry {
            round,
            clients,
            down_bytes: bytes_of(&StoredAdapter::read(&update)?),
            rank: rank.modules.iter().filter_map(|m| m.rank).max().unwrap_or(0),
            error: made.error,
            loss: measured.as_ref().map(|e| e.loss),
            choice_accuracy: measured.and_then(|e| e.choice_accuracy),
        }))
    }

    fn combine(
        &self,
        adapters: &[(PathBuf, Option<f64>)],
        method: &str,
        settings: &Map<String, Value>,
        output: &Path,
    ) -> Result<lorimer_adapter::algebra::combine::Combined> {
        // What an interruption left is made again.
        let request = Request { adapters, method, settings, output, overwrite: output.join(CONFIG_FILE).is_file() };
        Ok(combine(&request, |_, _, _| {})?)
    }

    fn method(&self, client: &Client) -> Result<Box<dyn Method>> {
        Ok(lorimer_adapter::methods::build("lora", &client.method)?)
    }

    fn seed(&self, round: usize, client: &Client) -> u64 {
        client_seed(self.settings.seed, round, &client.name)
    }

    /// Trains a client in a round, unless it has been; its last loss, None where it was stopped.
    fn client(
        &self,
        round: usize,
        client: &Client,
        folder: &Path,
        before: Option<&Path>,
        tell: &mut impl FnMut(Told<'_>),
    ) -> Result<Option<Option<f64>>> {
        if folder.join(CONFIG_FILE).is_file() {
            let log = read_bounded(&folder.join(LOG_FILE), 1 << 30)?;
            let records = log.split(|b| *b == b'\n').filter_map(|line| serde_json::from_slice::<Record>(line).ok());
            return Ok(Some(records.filter_map(|record| record.loss).next_back()));
        }
        let settings = TrainSettings { seed: self.seed(round, client), ..self.settings.clone() };
        let (start, beneath) = match (before, self.aggregate.carries()) {
            (Some(before), true) => (Some(before), Vec::new()),
            (Some(before), false) => (None, vec![Beneath::read(self.base, before, 1.0)?]),
            (None, _) => (None, Vec::new()),
        };
        let session = Session {
            base: self.base,
            base_name: self.base_name,
            train: &client.rows,
            eval: &[],
            settings,
            start,
            output: folder.to_path_buf(),
            save_steps: None,
            save_limit: 1,
            resume: true,
            overwrite: false,
            data_names: vec![client.name.clone()],
            stop: self.stop,
        };
        let (outcome, _) = session.run_over(self.method(client)?, &beneath, |event| tell(Told::Training(event)))?;
        Ok((!outcome.interrupted).then(|| outcome.losses.last().copied()))
    }

    /// What a client may send of what it has trained.
    fn private(
        &self,
        round: usize,
        client: &Client,
        own: &Path,
        before: Option<&Path>,
        privacy: Privacy,
    ) -> Result<PathBuf> {
        let stored = StoredAdapter::read(own)?;
        let start = match (before, self.aggregate.carries()) {
            (Some(before), true) => StoredAdapter::read(before)?,
            _ => Adapter::attach(self.base.model(), self.method(client)?, self.seed(round, client))?
                .to_stored(self.base_name)?,
        };
        let seed = site_seed(self.seed(round, client), "noise");
        let upload = own.join("upload");
        private(&stored, &start, privacy, seed)?.write(&upload, None)?;
        Ok(upload)
    }

    fn measured(&self, global: &Path) -> Result<Option<Evaluation>> {
        if self.eval.is_empty() {
            return Ok(None);
        }
        let adapter = Adapter::load_whole(self.base.model(), &StoredAdapter::read(global)?)?;
        let (attached, choices) = (Attached::one(&adapter), find_choices(self.eval));
        let base = self.base;
        Ok(Some(evaluate(base.model(), &base.text, &attached, self.eval, &choices, |_| {})?))
    }
}

/// The seed of a client in a round.
pub fn client_seed(seed: u64, round: usize, client: &str) -> u64 {
    // Below what JSON's readers can tell apart.
    site_seed(seed, &format!("round {round} client {client}")) >> 11
}

/// Bytes of an adapter's numbers, four each.
fn bytes_of(stored: &StoredAdapter) -> usize {
    stored.tensors.values().map(|t| t.elem_count() * 4).sum()
}
