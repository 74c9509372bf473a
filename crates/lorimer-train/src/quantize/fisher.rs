//! The diagonal of the empirical Fisher information: of every frozen weight the sum over rows of its squared gradient.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Tensor};
use lorimer_adapter::file::bytes::safetensors_bytes;
use lorimer_model::BaseModel;
use lorimer_model::files::{MAX_JSON_BYTES, read_json, write_atomic, write_json};
use lorimer_model::weights::SafetensorsFile;

use crate::calibrate::{Sum, gradients};
use crate::data::encode::Example;
use crate::error::{Error, Result};

/// Rows whose hidden states are in memory at a time.
const GROUP: usize = 8;

/// Computes F of all projections but the head into `folder`/fisher.safetensors, by path; goes on where an earlier call stopped. `progress` hears of rows.
/// False where `stop` was set; what was computed is kept.
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
    let (file, state) = (folder.join("fisher.safetensors"), folder.join("fisher.json"));
    let mut done: usize = if state.is_file() { read_json(&state, MAX_JSON_BYTES)? } else { 0 };
    if done >= rows.len() {
        return Ok(true);
    }
    let mut sums: BTreeMap<String, Tensor> = BTreeMap::new();
    if done > 0 {
        let kept = SafetensorsFile::open(&file)?;
        for name in kept.names() {
            sums.extend(kept.load(&name)?.map(|t| (name, t)));
        }
    }
    let method = lorimer_adapter::methods::build("lora", &serde_json::Map::new())?;
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
    }
    progress(done, rows.len());
    write_atomic(&file, &safetensors_bytes(&sums)?)?;
    write_json(&state, &done)?;
    Ok(done == rows.len())
}
