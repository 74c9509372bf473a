//! `lorimer quickstart`

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use lorimer::adapter::{Attached, methods};
use lorimer::model::Frozen;
use lorimer::train::{EncodeOptions, Session, TrainSettings, evaluate, find_choices};
use serde_json::{Map, json};

use crate::subcommands::train;
use lorimer_cli::common::{DtypeFlag, ModelArgs};
use lorimer_cli::{Global, common};

/// The files come with the program, so that it works from any folder.
const TRAIN: &str = include_str!("../../../../data/sentiment-movies.train.jsonl");
const VALID: &str = include_str!("../../../../data/sentiment-movies.valid.jsonl");

/// Fetch a small model, fine-tune it on film reviews, and show what it learned on reviews it has not seen
#[derive(Args)]
pub struct Quickstart {
    /// Folder for the adapter, its log, plot and card
    #[arg(long, short, default_value = "runs/quickstart")]
    output: PathBuf,
    /// Optimiser steps of 8 rows each
    #[arg(long, default_value_t = 91)]
    steps: usize,
}

impl Quickstart {
    pub fn run(self, global: Global) -> Result<ExitCode> {
        let clock = Instant::now();
        let model = ModelArgs { model: "smollm2-135m".into(), dtype: DtypeFlag::F32, tokenizer: None };
        let (base, pulled) = common::open_base(&model, global)?;
        base.config.decoder("`lorimer quickstart`")?;
        let paths = [("train", TRAIN), ("valid", VALID)].map(|(part, content)| self.write_rows(part, content));
        let paths = paths.into_iter().collect::<Result<Vec<PathBuf>>>()?;
        let (train, _) = common::load_data(&paths[0], &base.text, &EncodeOptions::default())?;
        let (valid, _) = common::load_data(&paths[1], &base.text, &EncodeOptions::default())?;
        let choices = find_choices(&valid);
        let measure = |what: &str, adaptation: &(dyn lorimer::model::Adaptation + Sync)| -> Result<_> {
            let bar = common::bar(
                valid.len() as u64,
                &format!("evaluating {what} {{bar:30}} {{pos}}/{{len}} rows {{eta}}"),
                global,
            );
            let e = evaluate(base.model(), &base.text, adaptation, &valid, &choices, |n| bar.set_position(n as u64))?;
            bar.finish_and_clear();
            Ok(e)
        };
        let before = measure("the base", &Frozen)?;
        let settings =
            TrainSettings { learning_rate: 1e-3, max_steps: Some(self.steps), warmup_steps: 5, ..Default::default() };
        let rows = train.len().min(self.steps * settings.batch_size);
        let session = Session {
            base: &base,
            base_name: &pulled.name,
            train: &train,
            eval: &[],
            settings,
            start: None,
            output: self.output.clone(),
            save_steps: Some(20),
            save_limit: 1,
            resume: false,
            overwrite: true,
            data_names: vec!["sentiment-movies.train.jsonl (neutral rows left out)".into()],
            stop: &common::stop_flag(),
        };
        let (outcome, adapter) = session.run(methods::build("lora", &Map::new())?, train::progress(global))?;
        if outcome.interrupted {
            eprintln!("interrupted after step {}", outcome.steps);
            return Ok(ExitCode::from(130));
        }
        let after = measure("the adapter", &Attached::one(&adapter))?;
        let mut json = train::result(&session, &outcome, &adapter);
        json["before"] = serde_json::to_value(&before)?;
        json["after"] = serde_json::to_value(&after)?;
        json["rows_used"] = json!(rows);
        json["total_seconds"] = json!(clock.elapsed().as_secs_f64());
        let accuracy = |e: &lorimer::train::Evaluation| 100.0 * e.choice_accuracy.unwrap_or_default();
        let (valid_path, output) = (paths[1].display(), self.output.display());
        common::print(global, &json, || {
            format!(
                "\n{:34}{:>10}{:>10}\n{:34}{:>10.1}{:>10.1}\n{:34}{:>10.3}{:>10.3}\n\n\
                 {rows} of {} training rows were used, {} steps, {:.0} s in all.\n\
                 Adapter, log, plot (loss.svg) and model card are in {output}; Python's PEFT loads it as it is.\n\n\
                 Next:\n  lorimer eval --data {valid_path} --adapter {output}\n  \
                 lorimer generate --adapter {output} --prompt {}\n  \
                 lorimer merge --adapter {output} --output runs/merged\n",
                format!("{} reviews not trained on", valid.len()),
                "base",
                "tuned",
                "accuracy, %",
                accuracy(&before),
                accuracy(&after),
                "loss a supervised token",
                before.loss,
                after.loss,
                train.len(),
                outcome.steps,
                clock.elapsed().as_secs_f64(),
                quoted("Is this movie review negative or positive?\n\nA warm, funny film that stays with you."),
            )
        })
    }

    /// Writes the rows of the two clear classes. The middle one is graded by the sentence's mean rating and hard for people too; the two show what
    /// was learned.
    fn write_rows(&self, part: &str, content: &str) -> Result<PathBuf> {
        let rows: String = content
            .lines()
            .filter(|l| !l.contains(r#""content": "neutral""#))
            .map(|l| l.replace("negative, neutral or positive", "negative or positive") + "\n")
            .collect();
        let path = self.output.join("data").join(format!("sentiment-movies.{part}.jsonl"));
        lorimer::model::files::write_atomic(&path, rows.as_bytes())?;
        Ok(path)
    }
}

/// A shell word with a newline in it.
fn quoted(text: &str) -> String {
    format!("$'{}'", text.replace('\n', "\\n").replace('\'', "\\'"))
}
