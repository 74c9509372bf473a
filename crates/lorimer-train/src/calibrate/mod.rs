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

pub mod pca;
pub mod search;
pub mod units;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Result as TensorResult, Tensor, TensorId, Var};
use lorimer_adapter::file::bytes::safetensors_bytes;
use lorimer_adapter::targets::Matcher;
use lorimer_adapter::{Calibration, CalibrationStats, Method};
use lorimer_model::weights::{SafetensorsFile, hex};
use lorimer_model::{Adaptation, BaseModel, Batch, Frozen, Inference, Layout, Projection, Recompute, Site};
use lorimer_tensor::{Gradients, Ops, Tape};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::calibrate::pca::IncrementalPca;
use crate::calibrate::search::SearchRows;
use crate::data::encode::Example;
use crate::error::{Error, Result};

/// Version of what is cached.
const CACHE_VERSION: u32 = 1;
/// Results kept on disk; the oldest go.
const CACHED: usize = 32;

/// Which projections a method targets, in the order of the model.
fn targeted<'a>(model: &'a dyn BaseModel, method: &dyn Method) -> Result<Vec<(&'a Site, &'a Projection)>> {
    let projections = model.projections();
    let matcher = Matcher::new(method.targeting(), projections.iter().map(|(site, _)| *site))?;
    Ok(projections.into_iter().filter(|(site, _)| matcher.targets(site)).collect())
}

/// Records every projection's input.
struct InputRecorder<'a> {
    /// Rows of the batch that count; None for all.
    rows: Option<Tensor>,
    record: &'a (dyn Fn(&Site, TensorId, &Tensor) -> TensorResult<()> + Sync),
}

impl Adaptation for InputRecorder<'_> {
    fn project(&self, site: &Site, base: &Projection, x: &Tensor) -> TensorResult<Tensor> {
        let counted = match &self.rows {
            Some(rows) => x.index_select(rows, 0)?,
            None => x.clone(),
        };
        (self.record)(site, x.id(), &counted.detach())?;
        base.forward(x)
    }
}

/// The principal directions of the targeted projections' inputs: for each site `components` (k, inputs), `singular` (k) and `explained`
/// (k). `rows` are taken in order, over and over if need be. `progress` hears of batches, how many projections hold still, and of how many.
pub fn inputs(
    model: &dyn BaseModel,
    method: &dyn Method,
    rows: &[&Example],
    mut progress: impl FnMut(usize, usize),
) -> Result<CalibrationStats> {
    let Calibration::Inputs { threshold, supervised_only, batch_size, max_batches } = method.calibration() else {
        return Ok(CalibrationStats::new());
    };
    if rows.is_empty() {
        return Err(Error::Settings("there is no data to calibrate on".into()));
    }
    let sites: Vec<&Site> = targeted(model, method)?.into_iter().map(|(site, _)| site).collect();
    let mut wanted: Vec<usize> =
        sites.iter().map(|s| Ok(method.components(s)?.min(s.inputs))).collect::<Result<_>>()?;
    let place: HashMap<&str, usize> = sites.iter().enumerate().map(|(i, s)| (s.path.as_str(), i)).collect();
    // The first site of each input hears for all that read it.
    let mut leader: Vec<usize> = (0..sites.len()).collect();
    let mut learners: Vec<IncrementalPca> = Vec::new();
    let (mut still, mut needed) = (vec![false; sites.len()], wanted.clone());
    let mut looked_at = 0;
    for step in 0..max_batches {
        let chunk: Vec<&Example> = (0..batch_size).map(|i| rows[(step * batch_size + i) % rows.len()]).collect();
        let tokens = chunk.iter().map(|e| e.tokens.as_slice());
        let batch = if supervised_only { model.shape().batch(tokens) } else { Batch::pack(tokens) };
        let counted: Vec<u32> = chunk
            .iter()
            .zip(&batch.rows)
            .flat_map(|(e, at)| e.supervised.iter().zip(at).filter(|(supervised, _)| **supervised).map(|(_, row)| *row))
            .collect();
        if supervised_only && counted.is_empty() {
            continue;
        }
        let count = counted.len();
        let counted = if supervised_only { Some(Tensor::from_vec(counted, count, &Device::Cpu)?) } else { None };
        if learners.is_empty() {
            let recorded: Mutex<Vec<(TensorId, usize)>> = Mutex::default();
            let record = |site: &Site, id: TensorId, _: &Tensor| {
                if let Some(&i) = place.get(site.path.as_str()) {
                    recorded.lock().unwrap_or_else(PoisonError::into_inner).push((id, i));
                }
                Ok(())
            };
            forward(model, &batch, &InputRecorder { rows: None, record: &record })?;
            let mut first: HashMap<TensorId, usize> = HashMap::new();
            for (id, i) in recorded.into_inner().unwrap_or_else(PoisonError::into_inner) {
                leader[i] = *first.entry(id).or_insert(i);
            }
            for i in 0..sites.len() {
                wanted[leader[i]] = wanted[leader[i]].max(wanted[i]);
            }
            learners = (0..sites.len()).map(|i| IncrementalPca::new(wanted[leader[i]])).collect();
        }
        // As in PEFT, a projection whose directions hold still looks away until more of them are needed.
        for i in (0..sites.len()).filter(|&i| leader[i] == i) {
            still[i] = learners[i].holds_still(needed[i], threshold);
        }
        let done = (0..sites.len()).filter(|&i| still[leader[i]]).count();
        progress(step, done);
        if done == sites.len() {
            break;
        }
        let recorded: Mutex<Vec<(usize, Tensor)>> = Mutex::default();
        let record = |site: &Site, _: TensorId, x: &Tensor| {
            match place.get(site.path.as_str()) {
                Some(&i) if leader[i] == i && !still[i] => {
                    recorded.lock().unwrap_or_else(PoisonError::into_inner).push((i, x.clone()));
                }
                _ => {}
            }
            Ok(())
        };
        forward(model, &batch, &InputRecorder { rows: counted, record: &record })?;
        looked_at = step + 1;
        let mut recorded: HashMap<usize, Tensor> =
            recorded.into_inner().unwrap_or_else(PoisonError::into_inner).into_iter().collect();
        let mut work: Vec<(&mut IncrementalPca, Tensor)> =
            learners.iter_mut().enumerate().filter_map(|(i, pca)| Some((pca, recorded.remove(&i)?))).collect();
        work.par_iter_mut().try_for_each(|(pca, x)| pca.add(x))?;
        if (0..sites.len()).all(|i| learners[leader[i]].components().is_some()) {
            let shares: Vec<Vec<f64>> = (0..sites.len()).map(|i| learners[leader[i]].explained()).collect();
            let all: Vec<(&Site, &[f64])> = sites.iter().copied().zip(shares.iter().map(Vec::as_slice)).collect();
            let found = method.allocate(&all)?;
            needed = (0..sites.len())
                .map(|i| (0..sites.len()).filter(|&j| leader[j] == i).map(|j| found[j]).max().unwrap_or(0))
                .collect();
        }
    }
    let holding = (0..sites.len()).filter(|&i| still[leader[i]]).count();
    tracing::info!(
        "looked at {looked_at} batches of {batch_size} rows; the directions of {holding} of {} projections hold still",
        sites.len()
    );
    if learners.is_empty() {
        return Err(Error::Settings(
            "no row of the data has a supervised token, so that there is nothing to calibrate on".into(),
        ));
    }
    learners
        .par_iter_mut()
        .enumerate()
        .filter(|(i, _)| leader[*i] == *i)
        .try_for_each(|(_, pca)| if pca.components().is_none() { pca.finish() } else { Ok(()) })?;
    let mut stats = CalibrationStats::new();
    for (i, site) in sites.iter().enumerate() {
        let pca = &learners[leader[i]];
        let Some((components, values)) = pca.components() else { continue };
        let explained = pca.explained();
        let k = explained.len();
        let found = [
            ("components", components.to_dtype(DType::F32)?),
            ("singular", Tensor::from_slice(values, k, &Device::Cpu)?),
            ("explained", Tensor::from_vec(explained, k, &Device::Cpu)?),
        ];
        stats.insert(site.path.clone(), found.into_iter().map(|(name, t)| (name.to_string(), t)).collect());
    }
    Ok(stats)
}

fn forward(model: &dyn BaseModel, batch: &Batch, recorder: &InputRecorder<'_>) -> Result<()> {
    model.hidden(batch, &Inference(recorder))?;
    Ok(())
}

/// Gives the frozen weights of some sites a gradient.
struct GradientRecorder<'a> {
    weights: &'a HashMap<String, Var>,
    tape: &'a Tape,
}

impl Adaptation for GradientRecorder<'_> {
    fn ops(&self) -> Ops<'_> {
        Ops::recorded(self.tape)
    }

    fn project(&self, site: &Site, base: &Projection, x: &Tensor) -> TensorResult<Tensor> {
        let Some(weight) = self.weights.get(&site.path) else { return base.forward_with(self.ops(), x) };
        let y = self.ops().dense(x, weight)?;
        match &base.bias {
            Some(bias) => self.ops().add_bias(&y, bias),
            None => Ok(y),
        }
    }

    fn touches(&self, site: &Site) -> bool {
        self.weights.contains_key(&site.path)
    }
}

/// How the gradients of batches become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sum {
    /// Their sum: the gradient of the mean loss of all rows.
    Plain,
    /// The sum of their absolute values.
    Absolute,
    /// The sum of their squares, each that of its batch's own mean loss: with batches of one row, the empirical Fisher information's diagonal.
    Squares,
}

/// The gradient of the mean loss of `rows` in every targeted frozen weight, handed to `on_layer` layer by layer, last layer first. `progress` hears of layers done, and of how many.
pub fn gradients(
    model: &dyn BaseModel,
    method: &dyn Method,
    rows: &[&Example],
    (batch_size, sum): (usize, Sum),
    mut on_layer: impl FnMut(Vec<(&Site, Tensor)>) -> Result<()>,
    mut progress: impl FnMut(usize, usize),
) -> Result<()> {
    let sites = targeted(model, method)?;
    let lowest = sites.iter().filter_map(|(s, _)| s.layer).min().unwrap_or(model.shape().layers.len());
    let steps = model.shape().layers.len() - lowest + 1;
    let total: usize = rows.iter().map(|e| e.targets().count()).sum();
    if total == 0 {
        return Err(Error::Settings(
            "no row of the data has a supervised token, so that there is nothing to calibrate on".into(),
        ));
    }
    struct Part {
        layout: Layout,
        again: Recompute,
        gradient: Option<Tensor>,
    }
    // The weights of a layer's sites as variables, and their gradients once all parts have been through.
    let variables = |layer: Option<usize>| -> Result<HashMap<String, Var>> {
        let of = sites.iter().filter(|(site, _)| site.layer == layer);
        of.map(|(site, base)| Ok((site.path.clone(), Var::from_tensor(&base.dense(model.dtype())?)?))).collect()
    };
    let tape_of = |weights: &HashMap<String, Var>| Tape::new(weights.values().map(Var::as_tensor));
    // But for the plain sum, a part's gradients are added up as soon as they are there.
    type Sums = HashMap<String, Tensor>;
    let add_up = |weights: &HashMap<String, Var>, found: &mut Gradients, sums: &mut Sums| -> TensorResult<()> {
        for (path, weight) in weights {
            let Some(g) = found.remove(weight) else { continue };
            let g = if sum == Sum::Squares { g.sqr()? } else { g.abs()? };
            let sum = match sums.remove(path) {
                Some(sum) => (sum + g)?,
                None => g,
            };
            sums.insert(path.clone(), sum);
        }
        Ok(())
    };
    let mut deliver =
        |layer: Option<usize>, weights: &HashMap<String, Var>, mut found: Gradients, mut sums: Sums| -> Result<()> {
            let of = sites.iter().filter(|(site, _)| site.layer == layer).map(|(site, _)| {
                let weight = &weights[&site.path];
                let g = sums.remove(&site.path).or_else(|| found.remove(weight));
                Ok((*site, g.map_or_else(|| weight.zeros_like(), Ok)?))
            });
            on_layer(of.collect::<TensorResult<_>>()?)
        };
    let mut parts = Vec::new();
    let (head, mut found, mut sums) = (variables(None)?, Gradients::default(), Sums::new());
    for rows in rows.chunks(batch_size.max(1)) {
        let cut = model.shape().prefixes_stand(rows.iter().map(|e| e.tokens.len()).max().unwrap_or(0));
        let batch = model.shape().batch(rows.iter().map(|e| e.seen(cut)));
        let pairs = rows.iter().zip(&batch.rows);
        let (index, targets): (Vec<u32>, Vec<u32>) =
            pairs.flat_map(|(e, at)| e.targets().map(|i| (at[i - 1], e.tokens[i]))).unzip();
        if targets.is_empty() {
            continue;
        }
        let layout = model.layout(&batch.positions, &batch.segments, None);
        let blocks = (0..model.shape().layers.len(), lowest);
        let stem = model.embed(&batch.tokens, &batch.positions, &Frozen)?;
        let (again, h) = rayon::scope(|_| Recompute::forward(model, stem, blocks, &layout, &Frozen))?;
        let tape = tape_of(&head);
        tape.track(&h);
        let recorder = GradientRecorder { weights: &head, tape: &tape };
        let last = model.end(&h, &recorder)?;
        let loss = model.loss(&recorder.ops().rows(&last, &index)?, &targets, &recorder)?;
        let count = if sum == Sum::Squares { targets.len() } else { total };
        let seed = Tensor::new(1.0 / count as f64, &Device::Cpu)?.to_dtype(loss.dtype())?;
        tape.backward(&loss, seed, &mut found)?;
        let gradient = found.remove(&h);
        if sum != Sum::Plain {
            add_up(&head, &mut found, &mut sums)?;
        }
        parts.push(Part { layout, again, gradient });
    }
    deliver(None, &head, found, sums)?;
    progress(1, steps);
    for layer in (lowest..model.shape().layers.len()).rev() {
        let (weights, mut found, mut sums) = (variables(Some(layer))?, Gradients::default(), Sums::new());
        for part in &mut parts {
            let Some(g) = part.gradient.take() else { continue };
            let tape = tape_of(&weights);
            let recorder = GradientRecorder { weights: &weights, tape: &tape };
            let (again, layout) = (&mut part.again, &part.layout);
            part.gradient = rayon::scope(|_| again.backward(model, layout, (&tape, &recorder), g, true, &mut found))?;
            if sum != Sum::Plain {
                add_up(&weights, &mut found, &mut sums)?;
            }
        }
        deliver(Some(layer), &weights, found, sums)?;
        progress(model.shape().layers.len() - layer + 1, steps);
    }
    Ok(())
}

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
