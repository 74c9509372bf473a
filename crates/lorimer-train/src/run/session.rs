//! From settings to an adapter folder: what `lorimer train` and `lorimer quickstart` do.

use crate::data::encode::rows_hash;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use lorimer_adapter::file::card::card;
use lorimer_adapter::file::store::CONFIG_FILE;
use lorimer_adapter::pruning::{PrunedFrom, check_parts, check_record, record_beside};
use lorimer_adapter::{Adapter, Attached, BaseIdentity, CalibrationStats, Golden, Manifest, Method, StoredAdapter};
use lorimer_model::Base;
use lorimer_model::pull::own_cache;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use crate::calibrate::{Data, calibrate};
use crate::data::encode::Example;
use crate::error::{Error, Result};
use crate::run::beneath::{Beneath, over};
use crate::run::checkpoint::Checkpoint;
use crate::run::evaluate::{find_choices, log_probabilities};
use crate::run::trainer::{Event, Outcome, Run, TrainSettings};

/// Golden prompts recorded with an adapter, and the longest that is taken.
const GOLDENS: usize = 4;
const GOLDEN_TOKENS: usize = 192;

/// One fine-tuning, from attached base to adapter folder.
pub struct Session<'a> {
    /// The base.
    pub base: &'a Base,
    /// Hub id or path that the adapter's configuration names.
    pub base_name: &'a str,
    /// Training rows.
    pub train: &'a [Example],
    /// Evaluation rows; may be empty.
    pub eval: &'a [Example],
    /// Settings.
    pub settings: TrainSettings,
    /// Folder of the adapter that the run begins from, which `method` is of; None for a new one.
    pub start: Option<&'a Path>,
    /// Where the adapter goes.
    pub output: PathBuf,
    /// Write a checkpoint every so many steps.
    pub save_steps: Option<usize>,
    /// Checkpoints kept.
    pub save_limit: usize,
    /// Go on where an interrupted run stopped.
    pub resume: bool,
    /// Begin anew though the output holds a run.
    pub overwrite: bool,
    /// Names of data files, for provenance.
    pub data_names: Vec<String>,
    /// Set from outside to stop after the step.
    pub stop: &'a AtomicBool,
}

impl Session<'_> {
    /// Trains and writes the adapter. The output folder then holds the adapter, the log, the plots and the card; or, if
    /// interrupted, a checkpoint to resume from. The adapter itself is returned too.
    ///
    /// # Errors
    ///
    /// Fails if the settings, the rows or the method do not fit the base or each other, if the output folder holds a run that is neither
    /// resumed nor overwritten, if training breaks down, or if a file cannot be read or written.
    pub fn run(&self, method: Box<dyn Method>, progress: impl FnMut(Event<'_>)) -> Result<(Outcome, Adapter)> {
        self.run_over(method, &[], progress)
    }

    /// [`Self::run`] with adapters at work that stay as they are: what is trained is the change on top of theirs.
    ///
    /// # Errors
    ///
    /// Fails as [`Self::run`] does, and if they cannot be at work together.
    pub fn run_over(
        &self,
        method: Box<dyn Method>,
        beneath: &[Beneath],
        mut progress: impl FnMut(Event<'_>),
    ) -> Result<(Outcome, Adapter)> {
        self.settings.check()?;
        let begun = self.output.join(CONFIG_FILE).exists() || Checkpoint::any(&self.output)?;
        if begun && !self.resume && !self.overwrite {
            return Err(Error::Settings(format!(
                "`{}` already holds a run; pass --resume to go on with it, --overwrite to begin anew, or choose another --output",
                self.output.display()
            )));
        }
        if self.overwrite {
            Checkpoint::clear(&self.output)?;
        }
        let longest = self.train.iter().chain(self.eval).map(|e| e.tokens.len()).max().unwrap_or(0);
        self.base.model().check_length(longest).map_err(lorimer_model::Error::from)?;
        let pruned = self.pruned()?;
        let config = method.config();
        let mut begun_from = None;
        let adapter = match self.start {
            // What was read is not kept beside the adapter.
            Some(folder) => {
                let stored = StoredAdapter::read(folder)?;
                check_record(&stored, &self.base.path, &self.base.model().shape().layers)?;
                begun_from = Some(stored.content_id()?);
                Adapter::load_whole(self.base.model(), &stored)?
            }
            None => {
                check_parts(method.parts(), &self.base.path, &self.base.model().shape().layers)?;
                let stats = self.calibrate(method.as_ref(), &mut progress)?;
                Adapter::attach_calibrated(self.base.model(), method, &stats, self.settings.seed)?
            }
        };
        let hash = |rows: &[Example]| rows_hash(&rows.iter().collect::<Vec<_>>());
        let choices = find_choices(self.eval);
        // Computing layers again changes no bit, so a run may go on with or without it.
        let mut settings = self.settings.clone();
        settings.step.checkpointing = false;
        let mut identity = json!({
            "method": adapter.method.name(), "config": config, "settings": settings,
            "base": self.base.fingerprint, "storage": self.storage(), "train": hash(self.train), "eval": hash(self.eval),
        });
        if let Some(start) = begun_from {
            identity["start"] = start.into();
        }
        if !beneath.is_empty() {
            let of = |below: &Beneath| json!({ "content_id": below.content_id, "weight": below.weight });
            identity["beneath"] = beneath.iter().map(of).collect();
        }
        over(&adapter, beneath)?;
        let run = Run {
            model: self.base.model(),
            text: &self.base.text,
            base_name: self.base_name,
            adapter: &adapter,
            beneath,
            train: self.train,
            eval: self.eval,
            choices: &choices,
            settings: &self.settings,
            identity,
            folder: &self.output,
            save_steps: self.save_steps,
            save_limit: self.save_limit,
            resume: self.resume,
            stop: self.stop,
        };
        let outcome = run.train(&mut progress)?;
        if !outcome.interrupted {
            self.write(&adapter, &outcome, &config, (pruned, beneath))?;
            Checkpoint::clear(&self.output)?;
        }
        Ok((outcome, adapter))
    }

    /// What the method wants to know of the data, looked at in an order of its own that follows from the seed.
    fn calibrate(&self, method: &dyn Method, progress: &mut impl FnMut(Event<'_>)) -> Result<CalibrationStats> {
        let mut rows: Vec<&Example> = self.train.iter().collect();
        let seed = lorimer_adapter::step::site_seed(self.settings.seed, "calibration");
        rows.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        let base = format!("{} {}", self.base.fingerprint, self.storage().unwrap_or_default());
        let data = Data { rows, base, cache: Some(own_cache().join("calibration")) };
        calibrate(self.base.model(), method, &data, |done, total| progress(Event::Calibrating { done, total }))
    }

    /// How the base's projections are kept in memory: `f32`, `nf4`, `Q4_1`.
    fn storage(&self) -> Option<String> {
        self.base.model().projections().first().map(|(_, p)| p.weight.storage_name())
    }

    /// Of a base that is a pruned model: which.
    fn pruned(&self) -> Result<Option<PrunedFrom>> {
        if !self.base.path.is_dir() {
            return Ok(None);
        }
        let record = record_beside(&self.base.path, &self.base.model().shape().layers)?;
        Ok(record.map(|pruning| pruning.identity()))
    }

    fn write(
        &self,
        adapter: &Adapter,
        outcome: &Outcome,
        config: &serde_json::Map<String, Value>,
        (pruned, beneath): (Option<PrunedFrom>, &[Beneath]),
    ) -> Result<()> {
        let mut stored = adapter.to_stored(self.base_name)?;
        if stored.tensors.is_empty() {
            return Err(Error::Diverged(
                "nothing is left of the adapter: every gate is closed; lower xi, or take fewer steps".into(),
            ));
        }
        let golden = self.goldens(adapter)?;
        stored.manifest = Some(Manifest {
            format: 1,
            content_id: stored.content_id()?,
            method: adapter.method.name().to_string(),
            lorimer: env!("CARGO_PKG_VERSION").to_string(),
            base: Some(BaseIdentity {
                name: self.base_name.to_string(),
                fingerprint: self.base.fingerprint.clone(),
                model_type: self.base.model().shape().model_type.clone(),
                pruned,
            }),
            chat_template: self.base.text.template_source().map(str::to_string),
            training: json!({
                "data": self.data_names, "examples": self.train.len(), "steps": outcome.steps,
                "best_step": outcome.best.filter(|_| self.settings.keep_best).map(|b| b.0),
                "settings": self.settings, "method_settings": config, "storage": self.storage(),
            }),
            golden,
            frozen: adapter.frozen_parts()?,
            xlora: adapter.mixture(),
        });
        if let Some(manifest) = stored.manifest.as_mut().filter(|_| !beneath.is_empty()) {
            let of = |below: &Beneath| json!({ "content_id": below.content_id, "weight": below.weight });
            manifest.training["beneath"] = beneath.iter().map(of).collect();
        }
        let stats = adapter.method.calibration_report();
        if let Some(manifest) = stored.manifest.as_mut().filter(|_| !stats.is_null()) {
            manifest.training["findings"] = stats;
        }
        let mut metrics =
            vec![("last training loss".to_string(), format!("{:.4}", outcome.losses.last().unwrap_or(&f64::NAN)))];
        if let Some(e) = &outcome.evaluation {
            metrics.push(("evaluation loss".into(), format!("{:.4}", e.loss)));
            metrics.push(("exact match".into(), format!("{:.4}", e.exact_match)));
            if let Some(accuracy) = e.choice_accuracy {
                metrics.push(("choice accuracy".into(), format!("{accuracy:.4}")));
            }
        }
        let text = card(&stored, &self.output.display().to_string(), &metrics);
        stored.write(&self.output, Some(&text))?;
        Ok(())
    }

    /// Log-probabilities of a few rows' answers, to be replayed wherever the adapter is used.
    fn goldens(&self, adapter: &Adapter) -> Result<Vec<Golden>> {
        let attached = Attached::one(adapter);
        let rows = if self.eval.is_empty() { self.train } else { self.eval };
        let short = rows.iter().filter(|e| e.tokens.len() <= GOLDEN_TOKENS);
        let golden = |e: &Example| {
            let first = e.targets().next().unwrap_or(1);
            let log_probabilities = log_probabilities(self.base.model(), &attached, &e.tokens, first)?;
            Ok(Golden { tokens: e.tokens.clone(), first, log_probabilities })
        };
        short.take(GOLDENS).map(golden).collect()
    }
}

/// What became of replaying an adapter's golden prompts.
///
/// # Errors
///
/// Fails if a recorded prompt does not fit the base, or if a tensor operation fails.
pub fn replay(base: &Base, adapter: &Adapter, stored: &StoredAdapter) -> Result<Option<f64>> {
    let Some(manifest) = stored.manifest.as_ref().filter(|m| !m.golden.is_empty()) else { return Ok(None) };
    let attached = Attached::one(adapter);
    let mut worst = 0f64;
    for golden in &manifest.golden {
        let fits = golden.first >= 1
            && golden.tokens.len() <= 4096
            && golden.first + golden.log_probabilities.len() == golden.tokens.len()
            && golden.tokens.iter().all(|&t| (t as usize) < base.model().shape().vocabulary);
        if !fits {
            return Err(Error::Settings(format!(
                "`{}`: a golden prompt in lorimer.json does not fit the base",
                stored.path.display()
            )));
        }
        let now = log_probabilities(base.model(), &attached, &golden.tokens, golden.first)?;
        for (a, b) in now.iter().zip(&golden.log_probabilities) {
            worst = worst.max(f64::from((a - b).abs()));
        }
    }
    Ok(Some(worst))
}
