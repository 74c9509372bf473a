//! `lorimer compare-run`: one run of a comparison, in a process of its own so that its memory can be told.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Error, Result, bail};
use clap::Args;
use lorimer_adapter::file::store::{StoredAdapter, WEIGHTS_FILE};
use lorimer_adapter::{Adapter, Attached, methods};
use lorimer_model::files::{read_json, write_json};
use lorimer_model::{Adaptation, Base, Frozen};
use lorimer_train::{EncodeOptions, Event, Example, Outcome, Session, TrainSettings, evaluate, find_choices};

use crate::compare::spec::{RunResult, RunSpec};
use lorimer_cli::common::{DtypeFlag, ModelArgs};
use lorimer_cli::{Global, common};

/// One run of a comparison
#[derive(Args)]
pub struct CompareRun {
    /// What to run
    spec: PathBuf,
    /// Folder for the adapter and its checkpoints
    #[arg(long)]
    work: PathBuf,
    /// Where the result goes
    #[arg(long)]
    result: PathBuf,
}

/// Rows that a run is measured on.
struct Measured<'a> {
    base: &'a Base,
    eval: Vec<Example>,
    choices: Vec<String>,
    /// Plain text, whose loss shows what is forgotten; may be empty.
    general: Vec<Example>,
}

impl Measured<'_> {
    /// Puts losses and accuracy into the result.
    fn measure(&self, adaptation: &(dyn Adaptation + Sync), result: &mut RunResult) -> lorimer_train::Result<()> {
        let of = |rows: &[Example], choices: &[String]| {
            evaluate(self.base.model(), &self.base.text, adaptation, rows, choices, |_| {})
        };
        let found = of(&self.eval, &self.choices)?;
        result.loss = Some(found.loss);
        result.accuracy = found.choice_accuracy.or(Some(found.exact_match));
        if !self.general.is_empty() {
            result.general_loss = Some(of(&self.general, &[])?.loss);
        }
        Ok(())
    }
}

/// Rows to train on, and those to measure on.
fn rows<'a>(spec: &RunSpec, base: &'a Base) -> Result<(Vec<Example>, Measured<'a>)> {
    let load = |path: &Path, options: EncodeOptions| Ok::<_, Error>(common::load_data(path, &base.text, &options)?.0);
    let mut train = load(&spec.task.data, EncodeOptions::default())?;
    let eval = match spec.held_out {
        Some(held_out) if held_out >= train.len() => {
            bail!("`{}` has {} rows, too few to hold {held_out} out", spec.task.data.display(), train.len())
        }
        Some(held_out) => train.split_off(train.len() - held_out),
        None => load(&spec.task.eval, EncodeOptions { limit: spec.task.eval_limit, ..Default::default() })?,
    };
    let general = match &spec.general {
        Some(path) => load(path, EncodeOptions::default())?,
        None => Vec::new(),
    };
    let choices = find_choices(&eval);
    Ok((train, Measured { base, eval, choices, general }))
}

fn settings(spec: &RunSpec) -> TrainSettings {
    TrainSettings {
        learning_rate: spec.lr,
        max_steps: Some(spec.steps),
        batch_size: spec.batch_size,
        warmup_steps: spec.warmup_steps.unwrap_or(spec.steps / 20),
        label_smoothing: spec.label_smoothing.unwrap_or(0.0),
        seed: spec.seed,
        ..Default::default()
    }
}

impl CompareRun {
    /// Does the run and writes its result.
    pub fn run(self, global: Global) -> Result<ExitCode> {
        let spec: RunSpec = read_json(&self.spec, 1 << 20)?;
        let model = ModelArgs { model: spec.model.clone(), dtype: DtypeFlag::F32, tokenizer: None };
        let (base, pulled) = common::open_base(&model, global)?;
        let (train, measured) = rows(&spec, &base)?;
        let mut result = RunResult::of(spec.clone());
        let Some(method) = &spec.method else {
            measured.measure(&Frozen, &mut result)?;
            write_json(&self.result, &result)?;
            return Ok(ExitCode::SUCCESS);
        };
        let beside = self.spec.parent().unwrap_or(Path::new("."));
        if let Some(missing) = spec.experts.iter().find(|name| !beside.join(name).is_dir()) {
            result.error = Some(format!("its expert `{missing}` has no adapter"));
            write_json(&self.result, &result)?;
            return Ok(ExitCode::SUCCESS);
        }
        let part = |name: &String| StoredAdapter::read(&beside.join(name))?.into_part();
        let parts = spec.experts.iter().map(part).collect::<lorimer_adapter::Result<Vec<_>>>()?;
        let mut session = Session {
            base: &base,
            base_name: &pulled.name,
            train: &train,
            eval: &[],
            settings: settings(&spec),
            start: None,
            output: self.work.clone(),
            save_steps: None,
            save_limit: 1,
            // An interrupted run goes on.
            resume: true,
            overwrite: false,
            data_names: Vec::new(),
            stop: &common::stop_flag(),
        };
        let clock = Instant::now();
        let mut started = None;
        let mut train = |session: &Session<'_>| {
            let mut method = methods::build(method, &spec.set)?;
            method.take_parts(&parts)?;
            session.run(method, |event| {
                if let Event::Begin { .. } = event {
                    started.get_or_insert(clock.elapsed().as_secs_f64());
                }
            })
        };
        let mut trained = train(&session);
        if trained.as_ref().is_err_and(|e| e.to_string().contains("begun with other settings")) {
            // What an older version began is begun anew.
            (session.resume, session.overwrite) = (false, true);
            trained = train(&session);
        }
        result.peak_bytes = common::peak_bytes();
        result.start_seconds = started;
        match trained {
            // A rate that is too high is a result.
            Err(error @ lorimer_train::Error::Diverged(_)) => result.error = Some(error.to_string()),
            Err(error) => return Err(error.into()),
            Ok((outcome, _)) if outcome.interrupted => return Ok(ExitCode::from(130)),
            Ok((outcome, adapter)) => self.fill(&mut result, outcome, &adapter, &measured)?,
        }
        write_json(&self.result, &result)?;
        Ok(ExitCode::SUCCESS)
    }

    /// Puts what came of a whole run into its result.
    fn fill(&self, result: &mut RunResult, outcome: Outcome, adapter: &Adapter, measured: &Measured<'_>) -> Result<()> {
        let last = &outcome.losses[outcome.losses.len().saturating_sub(10)..];
        result.train_loss = Some(last.iter().sum::<f64>() / last.len().max(1) as f64);
        result.losses = outcome.losses;
        result.seconds = Some(outcome.seconds);
        result.trainable_parameters = Some(adapter.parameter_count());
        result.file_bytes = std::fs::metadata(self.work.join(WEIGHTS_FILE)).ok().map(|m| m.len());
        // The last step may be the one that ran away.
        let ran_away = match measured.measure(&Attached::one(adapter), result) {
            Err(lorimer_train::Error::Diverged(message)) => Some(message),
            found => {
                found?;
                let loss = result.loss.filter(|loss| !loss.is_finite());
                loss.map(|loss| format!("the loss on the measured rows is {loss}"))
            }
        };
        if let Some(message) = ran_away {
            result.error = Some(format!("after training, {message}"));
            (result.loss, result.accuracy, result.general_loss) = (None, None, None);
        }
        Ok(())
    }
}
