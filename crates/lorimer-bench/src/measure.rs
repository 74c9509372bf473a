//! What the measurements share: the machine's own rate, medians, measurements in a process of their own.

use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::Tensor;
use serde_json::Value;

/// GFLOP/s of a large f32 product on all threads: the median of some.
pub fn sgemm_rate() -> Result<f64> {
    let (m, n, k) = (1024, 1536, 576);
    let x = Tensor::rand(-1f32, 1.0, (m, k), &candle_core::Device::Cpu)?;
    let w = lorimer_tensor::FrozenWeight::Dense(Tensor::rand(-1f32, 1.0, (n, k), &candle_core::Device::Cpu)?);
    let mut rates = Vec::new();
    for _ in 0..25 {
        let clock = Instant::now();
        for _ in 0..4 {
            lorimer_tensor::frozen_linear(&x, &w)?;
        }
        rates.push(4.0 * 2.0 * (m * n * k) as f64 / clock.elapsed().as_secs_f64() / 1e9);
    }
    Ok(median(rates))
}

pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The value of a field in every object, its median.
pub(crate) fn median_of(objects: &[Value], field: &str) -> f64 {
    median(objects.iter().filter_map(|o| o[field].as_f64()).collect())
}

/// Last part of a path.
pub(crate) fn short_name(work: &str) -> String {
    PathBuf::from(work).file_name().map_or(work.to_string(), |n| n.to_string_lossy().into_owned())
}

/// Runs a command and reads the JSON object on the last line of its output.
pub(crate) fn answer(mut command: Command, what: &str) -> Result<Value> {
    let output = command.output().with_context(|| format!("cannot run `{what}`"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let last = text.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or_default();
    match serde_json::from_str(last) {
        Ok(value) if output.status.success() => Ok(value),
        _ => {
            let errors = String::from_utf8_lossy(&output.stderr).into_owned();
            let reason = errors.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or("it printed no JSON object");
            bail!("`{what}` failed: {}", reason.trim().trim_start_matches("error: "))
        }
    }
}
