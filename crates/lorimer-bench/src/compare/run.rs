//! `lorimer compare-run`: one run of a comparison, in a process of its own so that its memory can be told.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;
use lorimer_adapter::file::store::WEIGHTS_FILE;
use lorimer_adapter::{Attached, methods};
use lorimer_model::files::{read_json, write_json};
use lorimer_model::{Adaptation, Frozen};
use lorimer_train::{EncodeOptions, Event, Example, Session, TrainSettings, evaluate, find_choices};

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

impl CompareRun {
    /// Does the run and writes its result.
    pub fn run(self, global: Global) -> Result<ExitCode> {
        let spec: RunSpec = read_json(&self.spec, 1 << 20)?;
        let model = ModelArgs { model: spec.model.clone(), dtype: DtypeFlag::F32, tokenizer: None };
        let (base, pulled) = common::open_base(&model, global)?;
        let (mut train, _) = common::load_data(&spec.task.data, &base.text, &EncodeOptions::default())?;
        let eval = match spec.held_out {
            Some(held_out) if held_out >= train.len() => {
                bail!("`{}` has {} rows, too few to hold {held_out} out", spec.task.data.display(), train.len())
            }
            Some(held_out) => train.split_off(train.len() - held_out),
            None => {
                let options = EncodeOptions { limit: spec.task.eval_limit, ..Default::default() };
                common::load_data(&spec.task.eval, &base.text, &options)?.0
            }
        };
        let general = match &spec.general {
            Some(path) => common::load_data(path, &base.text, &EncodeOptions::default())?.0,
            None => Vec::new(),
        };
        let mut result = RunResult {
            spec: spec.clone(),
            error: None,
            loss: None,
            accuracy: None,
            general_loss: None,
            train_loss: None,
            losses: Vec::new(),
            seconds: None,
            start_seconds: None,
            peak_bytes: None,
            trainable_parameters: None,
            file_bytes: None,
        };
        let choices = find_choices(&eval);
        let measure = |adaptation: &(dyn Adaptation + Sync), result: &mut RunResult| -> lorimer_train::Result<()> {
            let found = evaluate(base.model(), &base.text, adaptation, &eval, &choices, |_| {})?;
            result.loss = Some(found.loss);
            result.accuracy = found.choice_accuracy.or(Some(found.exact_match));
            let of = |rows: &[Example]| evaluate(base.model(), &base.text, adaptation, rows, &[], |_| {});
            if !general.is_empty() {
                result.general_loss = Some(of(&general)?.loss);
            }
            Ok(())
        };
        let Some(method) = &spec.method else {
            measure(&Frozen, &mut result)?;
            write_json(&self.result, &result)?;
            return Ok(ExitCode::SUCCESS);
        };
        let mut session = Session {
            base: &base,
            base_name: &pulled.name,
            train: &train,
            eval: &[],
            settings: TrainSettings {
                learning_rate: spec.lr,
                max_steps: Some(spec.steps),
                batch_size: spec.batch_size,
                warmup_steps: spec.warmup_steps.unwrap_or(spec.steps / 20),
                label_smoothing: spec.label_smoothing.unwrap_or(0.0),
                seed: spec.seed,
                ..Default::default()
            },
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
            session.run(methods::build(method, &spec.set)?, |event| {
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
            Ok((outcome, adapter)) => {
                let last = &outcome.losses[outcome.losses.len().saturating_sub(10)..];
                result.train_loss = Some(last.iter().sum::<f64>() / last.len().max(1) as f64);
                result.losses = outcome.losses;
                result.seconds = Some(outcome.seconds);
                result.trainable_parameters = Some(adapter.parameter_count());
                result.file_bytes = std::fs::metadata(self.work.join(WEIGHTS_FILE)).ok().map(|m| m.len());
                // The last step may be the one that ran away.
                let ran_away = match measure(&Attached::one(&adapter), &mut result) {
                    Err(lorimer_train::Error::Diverged(message)) => Some(message),
                    found => {
                        found?;
                        result
                            .loss
                            .filter(|loss| !loss.is_finite())
                            .map(|loss| format!("the loss on the measured rows is {loss}"))
                    }
                };
                if let Some(message) = ran_away {
                    result.error = Some(format!("after training, {message}"));
                    (result.loss, result.accuracy, result.general_loss) = (None, None, None);
                }
            }
        }
        write_json(&self.result, &result)?;
        Ok(ExitCode::SUCCESS)
    }
}
