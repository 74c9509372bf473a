//! The diagonal of the empirical Fisher information: of every frozen weight the sum over rows of its squared gradient.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use lorimer_adapter::file::bytes::safetensors_bytes;
use lorimer_model::BaseModel;
use lorimer_model::files::write_atomic;
use lorimer_model::weights::SafetensorsFile;

use crate::calibrate::{Sum, gradients};
use crate::data::encode::Example;
use crate::error::{Error, Result};

/// Rows whose hidden states are in memory at a time.
const GROUP: usize = 8;
/// Times longer than the last writing of the sums that is computed before they are written again.
const BETWEEN: u32 = 20;
/// The tensor beside the sums that says of how many rows they are.
const ROWS: &str = "rows";

/// Computes F of all projections but the head into `folder`/fisher.safetensors, by path; goes on where an earlier call stopped. `progress` hears of rows.
/// False where `stop` was set. What was computed is kept as it goes, at about a twentieth of the time.
///
/// # Errors
///
/// Fails if no row has a token to learn, or if a file cannot be read or written.
pub(super) fn compute(
    model: &dyn BaseModel,
    rows: &[&Example],
    folder: &Path,
    stop: &AtomicBool,
    mut progress: impl FnMut(usize, usize),
) -> Result<bool> {
    let rows: Vec<&Example> = rows.iter().copied().filter(|row| row.targets().next().is_some()).collect();
    if rows.is_empty() {
        return Err(Error::Settings("no row for the Fisher information has a token to learn".into()));
    }
    let file = folder.join("fisher.safetensors");
    let mut sums: BTreeMap<String, Tensor> = BTreeMap::new();
    if file.is_file() {
        let kept = SafetensorsFile::open(&file)?;
        for name in kept.names() {
            sums.extend(kept.load(&name)?.map(|t| (name, t)));
        }
    }
    let mut done = match sums.remove(ROWS) {
        Some(count) => count.to_scalar::<i64>()? as usize,
        None => 0,
    };
    if done >= rows.len() {
        return Ok(true);
    }
    let method = lorimer_adapter::methods::build("lora", &serde_json::Map::new())?;
    let keep = |sums: &mut BTreeMap<String, Tensor>, done: usize| -> Result<Duration> {
        let begun = Instant::now();
        sums.insert(ROWS.into(), Tensor::new(done as i64, &Device::Cpu)?);
        write_atomic(&file, &safetensors_bytes(sums)?)?;
        sums.remove(ROWS);
        Ok(begun.elapsed())
    };
    let (mut since, mut took) = (Instant::now(), Duration::ZERO);
    for group in rows[done..].chunks(GROUP) {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        progress(done, rows.len());
        let add = |layer: Vec<(&lorimer_model::Site, Tensor)>| {
            for (site, squares) in layer {
                let squares = squares.to_dtype(DType::F32)?;
                let sum = match sums.remove(&site.path) {
                    Some(sum) => (sum + squares)?,
                    None => squares,
                };
                sums.insert(site.path.clone(), sum);
            }
            Ok(())
        };
        gradients(model, method.as_ref(), group, (1, Sum::Squares), add, |_, _| {})?;
        done += group.len();
        if done < rows.len() && since.elapsed() >= BETWEEN * took {
            took = keep(&mut sums, done)?;
            since = Instant::now();
        }
    }
    progress(done, rows.len());
    keep(&mut sums, done)?;
    Ok(done == rows.len())
}
