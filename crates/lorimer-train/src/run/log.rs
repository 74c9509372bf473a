//! What a run leaves to look at: a JSONL log, a TensorBoard event file, a loss plot as SVG and PNG.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use lorimer_model::error::Error as ModelError;
use lorimer_model::files::{create_folder, write_atomic};
use lorimer_model::protobuf::{bytes, fixed32, fixed64, number};
use plotters::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::run::chart::{self, Chart, Frame};

/// One line of the log: a training step or an evaluation. Values that are not of its kind are left out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Steps taken when it was written.
    pub step: usize,
    /// Mean −log p over the step's supervised tokens.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub loss: Option<f64>,
    /// The objective's further term (BA-LoRA's regularisers).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub regularizer: Option<f64>,
    /// Σ_e P_e C_e of the routes of blocks' units, its mean over the step's rows of data (LLaVA-MoLE).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub router_balance: Option<f64>,
    /// Of each block whose unit is routed, the share of the step's positions that went to each expert (LLaVA-MoLE).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub expert_shares: Option<BTreeMap<usize, Vec<f64>>>,
    /// Share of gates that are open (SoRA).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub open_gates: Option<f64>,
    /// Share of attention heads, in rows of more than a tile, whose gradient was low-rank and not exact (`--attention-grad lowrank`).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub low_rank_heads: Option<f64>,
    /// The largest of their bounds of |q·k|/√d.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub low_rank_score: Option<f64>,
    /// Where low-rank gradients were held against exact ones: the largest relative error.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub low_rank_error: Option<f64>,
    /// The largest error of an entry as a share of its bound.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub low_rank_bound: Option<f64>,
    /// Rank of the step (DyLoRA).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub rank: Option<usize>,
    /// Rate of the step.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub learning_rate: Option<f64>,
    /// Norm of the gradient before clipping.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub gradient_norm: Option<f64>,
    /// Loss on the evaluation data.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub eval_loss: Option<f64>,
    /// Exact matches on the evaluation data.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub eval_exact_match: Option<f64>,
    /// Choice accuracy on the evaluation data.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub eval_choice_accuracy: Option<f64>,
}

impl Record {
    fn scalars(&self) -> Vec<(String, f64)> {
        let all = [
            ("train/loss", self.loss),
            ("train/regularizer", self.regularizer),
            ("train/router_balance", self.router_balance),
            ("train/open_gates", self.open_gates),
            ("train/low_rank_heads", self.low_rank_heads),
            ("train/low_rank_score", self.low_rank_score),
            ("train/low_rank_error", self.low_rank_error),
            ("train/low_rank_bound", self.low_rank_bound),
            ("train/rank", self.rank.map(|r| r as f64)),
            ("train/learning_rate", self.learning_rate),
            ("train/gradient_norm", self.gradient_norm),
            ("eval/loss", self.eval_loss),
            ("eval/exact_match", self.eval_exact_match),
            ("eval/choice_accuracy", self.eval_choice_accuracy),
        ];
        let all = all.into_iter().filter_map(|(name, value)| Some((name.to_string(), value?)));
        let shares = self.expert_shares.iter().flatten().flat_map(|(layer, shares)| {
            let of = move |(e, share): (usize, &f64)| (format!("train/expert_shares/block_{layer}/{e}"), *share);
            shares.iter().enumerate().map(of)
        });
        all.chain(shares).collect()
    }
}

/// Name of the JSONL log in a run's folder.
pub const LOG_FILE: &str = "log.jsonl";

/// Writes records to the run's log and event file as they come.
pub struct Log {
    jsonl: (PathBuf, File),
    events: (PathBuf, File),
}

impl Log {
    /// Begins a run's log with what an earlier part of the run had written up to its checkpoint; later lines of that
    /// part are gone, since the steps are taken again.
    pub fn open(run: &Path, history: &[Record]) -> Result<Self> {
        create_folder(run)?;
        let jsonl = run.join(LOG_FILE);
        let mut lines = Vec::new();
        for record in history {
            lines.extend(line(record)?);
        }
        write_atomic(&jsonl, &lines)?;
        let folder = run.join("tensorboard");
        create_folder(&folder)?;
        for entry in fs::read_dir(&folder).map_err(ModelError::io("read", &folder))?.flatten() {
            if entry.file_name().to_string_lossy().starts_with("events.out.tfevents.") {
                let _ = fs::remove_file(entry.path());
            }
        }
        let events = folder.join(format!("events.out.tfevents.{}.lorimer", now() as u64));
        let mut bytes = framed(&event(0, Body::Version));
        for record in history {
            bytes.extend(summary(record));
        }
        write_atomic(&events, &bytes)?;
        let append = |path: PathBuf| -> Result<(PathBuf, File)> {
            let file = OpenOptions::new().append(true).open(&path).map_err(ModelError::io("write", &path))?;
            Ok((path, file))
        };
        Ok(Self { jsonl: append(jsonl)?, events: append(events)? })
    }

    /// Adds a record to both files.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        let (path, file) = &mut self.jsonl;
        file.write_all(&line(record)?).map_err(ModelError::io("write", path))?;
        let (path, file) = &mut self.events;
        file.write_all(&summary(record)).map_err(ModelError::io("write", path))?;
        Ok(())
    }
}

fn line(record: &Record) -> Result<Vec<u8>> {
    let mut line = serde_json::to_vec(record).map_err(|e| Error::Settings(e.to_string()))?;
    line.push(b'\n');
    Ok(line)
}

fn now() -> f64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// CRC-32C, bit by bit (records are a few dozen bytes).
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |c, _| if c & 1 == 1 { (c >> 1) ^ 0x82f6_3b78 } else { c >> 1 })
    })
}

/// A TFRecord: length, masked CRC of the length, data, masked CRC of the data.
fn framed(data: &[u8]) -> Vec<u8> {
    let masked = |bytes: &[u8]| crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes();
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked(&length), data, &masked(data)].concat()
}

enum Body<'a> {
    Version,
    Scalar(&'a str, f64),
}

/// `Event { wall_time = 1, step = 2, file_version = 3 | summary = 5 }`.
fn event(step: usize, body: Body<'_>) -> Vec<u8> {
    let head = [fixed64(1, now().to_bits()), number(2, step as u64)].concat();
    let body = match body {
        Body::Version => bytes(3, b"brain.Event:2"),
        // Summary { value = 1: Value { tag = 1, simple_value = 2 } }
        Body::Scalar(tag, value) => {
            let value = [bytes(1, tag.as_bytes()), fixed32(2, (value as f32).to_bits())].concat();
            bytes(5, &bytes(1, &value))
        }
    };
    [head, body].concat()
}

fn summary(record: &Record) -> Vec<u8> {
    record.scalars().into_iter().flat_map(|(tag, v)| framed(&event(record.step, Body::Scalar(&tag, v)))).collect()
}

/// Draws the run's losses to `loss.svg` and `loss.png`.
pub fn plot(run: &Path, history: &[Record], title: &str) -> Result<()> {
    let train: Vec<(f64, f64)> = history.iter().filter_map(|r| Some((r.step as f64, r.loss?))).collect();
    let eval: Vec<(f64, f64)> = history.iter().filter_map(|r| Some((r.step as f64, r.eval_loss?))).collect();
    if train.is_empty() {
        return Ok(());
    }
    let last = train.iter().chain(&eval).map(|p| p.0).fold(1.0, f64::max);
    let top = train.iter().chain(&eval).map(|p| p.1).fold(0.0, f64::max).max(1e-6) * 1.05;
    let frame = Frame {
        size: (900, 540),
        title: Some(title),
        x: ("step", 0.0..last),
        y: ("loss (nats a supervised token)", 0.0..top),
        x_label: None,
        legend: true,
    };
    let failed = |path: &Path, e: String| Error::data(path, format!("the plot cannot be drawn: {e}"));
    let path = run.join("loss.svg");
    let svg = chart::svg(&frame, |chart| draw_losses(chart, &train, &eval)).map_err(|e| failed(&path, e))?;
    write_atomic(&path, svg.as_bytes())?;
    let path = run.join("loss.png");
    let png = chart::png(&frame, |chart| draw_losses(chart, &train, &eval)).map_err(|e| failed(&path, e))?;
    write_atomic(&path, &png)?;
    Ok(())
}

/// Mean of each point with its neighbours: the thick line through the noisy one.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let reach = points.len() / 20;
    let mean = |i: usize| {
        let window = &points[i.saturating_sub(reach)..(i + reach + 1).min(points.len())];
        window.iter().map(|p| p.1).sum::<f64>() / window.len() as f64
    };
    points.iter().enumerate().map(|(i, p)| (p.0, mean(i))).collect()
}

fn draw_losses<'c, B: DrawingBackend + 'c>(
    chart: &mut Chart<'c, B>,
    train: &[(f64, f64)],
    eval: &[(f64, f64)],
) -> std::result::Result<(), String> {
    let (blue, orange) = (RGBColor(31, 90, 160), RGBColor(214, 96, 20));
    chart::line(chart, train, blue.mix(0.3).into(), None)?;
    chart::line(chart, &smooth(train), blue.stroke_width(2), Some("training"))?;
    if !eval.is_empty() {
        chart::line(chart, eval, orange.stroke_width(2), Some("evaluation"))?;
        chart.draw_series(eval.iter().map(|p| Circle::new(*p, 4, orange.filled()))).map_err(chart::message)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc_equals_the_published_check_value() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn the_log_of_a_resumed_run_begins_with_its_history() {
        let folder = tempfile::tempdir().unwrap();
        let record = |step| Record { step, loss: Some(1.0), ..Default::default() };
        let mut log = Log::open(folder.path(), &[]).unwrap();
        (1..4).for_each(|s| log.write(&record(s)).unwrap());
        let mut log = Log::open(folder.path(), &[record(1)]).unwrap();
        log.write(&record(2)).unwrap();
        let text = fs::read_to_string(folder.path().join(LOG_FILE)).unwrap();
        assert_eq!(text, "{\"step\":1,\"loss\":1.0}\n{\"step\":2,\"loss\":1.0}\n");
        assert_eq!(fs::read_dir(folder.path().join("tensorboard")).unwrap().count(), 1);
    }

    #[test]
    fn plots_are_drawn_in_both_forms() {
        let folder = tempfile::tempdir().unwrap();
        let history: Vec<Record> =
            (1..40).map(|s| Record { step: s, loss: Some(3.0 / s as f64), ..Default::default() }).collect();
        plot(folder.path(), &history, "a run").unwrap();
        assert!(fs::read_to_string(folder.path().join("loss.svg")).unwrap().contains("training"));
        assert!(fs::read(folder.path().join("loss.png")).unwrap().starts_with(b"\x89PNG"));
    }
}
