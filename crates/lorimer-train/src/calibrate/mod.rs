//! A look at the training data before an adapter is attached: what the projections' inputs are like, or which way the frozen weights'
//! gradients point. A *recorder* stands at the seam while the plain model runs; what it finds goes to the method.
//!
//! - [`inputs`]: the principal directions of every projection's inputs, incrementally (Ross et al. 2008, "Incremental learning for robust
//!   visual tracking", section 3.1: mean-free, each batch joined to what is there by one small SVD), until those that the method
//!   needs hold still. Projections that read the same input share one.
//! - [`gradients`]: the sum over some rows of the gradient of each frozen weight. The hidden states between layers are kept from one
//!   forward; then layer by layer from the last one, so that only one layer's gradients exist at a time.
//!
//! [`calibrate`] does what a method asks for and keeps the result in a cache on disk, by the content of all that decides it.

mod input_directions;
pub mod pca;
pub mod search;
mod targeted;
pub mod units;
mod weight_gradients;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use lorimer_adapter::file::bytes::safetensors_bytes;
use lorimer_adapter::{Calibration, CalibrationStats, Method};
use lorimer_model::weights::{SafetensorsFile, hex};
use lorimer_model::{BaseModel, Projection, Site};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

pub use self::input_directions::inputs;
use self::search::SearchRows;
use self::targeted::targeted;
pub use self::weight_gradients::{Sum, gradients};
use crate::data::encode::Example;
use crate::error::{Error, Result};

/// Version of what is cached.
const CACHE_VERSION: u32 = 1;
/// Results kept on disk; the oldest go.
const CACHED: usize = 32;

/// What decides a calibration's result besides the method.
pub struct Data<'a> {
    /// The rows to look at, in order.
    pub rows: Vec<&'a Example>,
    /// What stands for the base: its fingerprint and how its weights are kept.
    pub base: String,
    /// Where results are kept; None for nowhere.
    pub cache: Option<PathBuf>,
}

/// Does what the method asks for, or takes it from the cache. `progress` hears how much of how much is done.
pub fn calibrate(
    model: &dyn BaseModel,
    method: &dyn Method,
    data: &Data<'_>,
    mut progress: impl FnMut(usize, usize),
) -> Result<CalibrationStats> {
    let calibration = method.calibration();
    if calibration == Calibration::Nothing {
        return Ok(CalibrationStats::new());
    }
    if data.rows.is_empty() {
        return Err(Error::Settings("there is no data to calibrate on".into()));
    }
    let looked_at: Vec<&Example> = match calibration {
        Calibration::Gradients { samples, .. } => data.rows.iter().copied().take(samples).collect(),
        _ => data.rows.clone(),
    };
    let path = match &data.cache {
        Some(folder) => {
            let key = (CACHE_VERSION, &data.base, method.name(), method.config(), &calibration);
            let key = serde_json::to_string(&key).map_err(|e| Error::Settings(e.to_string()))?;
            let mut hash = Sha256::new();
            hash.update(key);
            hash.update(crate::data::encode::rows_hash(&looked_at));
            Some(folder.join(format!("{}.safetensors", hex(&hash.finalize()))))
        }
        None => None,
    };
    if let Some(found) = path.as_deref().and_then(read) {
        return Ok(found);
    }
    let stats = match calibration {
        Calibration::Gradients { batch_size, absolute, .. } => {
            let mut stats = CalibrationStats::new();
            let bases: HashMap<&str, &Projection> =
                model.projections().into_iter().map(|(site, base)| (site.path.as_str(), base)).collect();
            let reduce = |layer: Vec<(&Site, Tensor)>| {
                let one = |(site, gradient): &(&Site, Tensor)| {
                    Ok((site.path.clone(), method.reduce_gradients(site, bases[site.path.as_str()], gradient)?))
                };
                stats.extend(layer.par_iter().map(one).collect::<Result<Vec<_>>>()?);
                Ok(())
            };
            let sum = if absolute { Sum::Absolute } else { Sum::Plain };
            gradients(model, method, &looked_at, (batch_size, sum), reduce, progress)?;
            stats
        }
        Calibration::Search(settings) => {
            let missing = || Error::Settings(format!("`{}` has no search", method.name()));
            let search = lorimer_adapter::methods::parts::search(method.name()).ok_or_else(missing)?;
            let mut progress = progress;
            search(&SearchRows { model, rows: &looked_at }, method.targeting(), &settings, &mut progress)?
        }
        _ => {
            let all = targeted(model, method)?.len();
            inputs(model, method, &looked_at, |_, done| progress(done, all))?
        }
    };
    if let Some(path) = &path {
        // A cache that cannot be written costs time only.
        if let Err(error) = write(path, &stats) {
            tracing::warn!("the calibration is not kept: {error}");
        }
    }
    Ok(stats)
}

/// Between a site and a name in the cache's keys.
const BETWEEN: char = '|';

fn write(path: &Path, stats: &CalibrationStats) -> Result<()> {
    let tensors: BTreeMap<String, Tensor> = stats
        .iter()
        .flat_map(|(site, found)| found.iter().map(move |(name, t)| (format!("{site}{BETWEEN}{name}"), t.clone())))
        .collect();
    if let Some(folder) = path.parent() {
        lorimer_model::files::create_folder(folder)?;
        forget_oldest(folder);
    }
    lorimer_model::files::write_atomic(path, &safetensors_bytes(&tensors)?)?;
    Ok(())
}

fn forget_oldest(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    let mut files: Vec<_> = entries
        .filter_map(|e| {
            let e = e.ok()?;
            let ours = e.path().extension().is_some_and(|x| x == "safetensors");
            Some((e.metadata().ok()?.modified().ok()?, e.path())).filter(|_| ours)
        })
        .collect();
    files.sort();
    let surplus = files.len().saturating_sub(CACHED - 1);
    for (_, path) in files.into_iter().take(surplus) {
        let _ = std::fs::remove_file(path);
    }
}

/// A result out of the cache; one that cannot be read is as none.
fn read(path: &Path) -> Option<CalibrationStats> {
    if !path.is_file() {
        return None;
    }
    let file = SafetensorsFile::open(path).ok()?;
    let mut stats = CalibrationStats::new();
    for key in file.names() {
        let (site, name) = key.rsplit_once(BETWEEN)?;
        stats.entry(site.to_string()).or_default().insert(name.to_string(), file.load(&key).ok()??);
    }
    Some(stats)
}
