//! The principal directions of projections' inputs, found batch by batch.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Result as TensorResult, Tensor, TensorId};
use lorimer_adapter::{Calibration, CalibrationStats, Method};
use lorimer_model::{Adaptation, BaseModel, Batch, Inference, Projection, Site};
use rayon::prelude::*;

use super::pca::IncrementalPca;
use super::targeted::targeted;
use crate::data::encode::Example;
use crate::error::{Error, Result};

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
    let mut directions = Directions::new(model, method, sites)?;
    let mut looked_at = 0;
    for step in 0..max_batches {
        let chunk: Vec<&Example> = (0..batch_size).map(|i| rows[(step * batch_size + i) % rows.len()]).collect();
        let Some((batch, counted)) = counted_batch(model, &chunk, supervised_only)? else { continue };
        directions.begin(&batch)?;
        let (done, all) = directions.hold_still(threshold);
        progress(step, done);
        if done == all {
            break;
        }
        directions.add(&batch, counted)?;
        looked_at = step + 1;
        directions.allocate()?;
    }
    tracing::info!(
        "looked at {looked_at} batches of {batch_size} rows; the directions of {} of {} projections hold still",
        directions.holding(),
        directions.sites.len()
    );
    directions.finish()
}

/// A batch of some rows, and which of its rows count (None: all). None where none would.
fn counted_batch(
    model: &dyn BaseModel,
    rows: &[&Example],
    supervised_only: bool,
) -> Result<Option<(Batch, Option<Tensor>)>> {
    let tokens = rows.iter().map(|e| e.tokens.as_slice());
    if !supervised_only {
        return Ok(Some((Batch::pack(tokens), None)));
    }
    let batch = model.shape().batch(tokens);
    let counted: Vec<u32> = rows
        .iter()
        .zip(&batch.rows)
        .flat_map(|(e, at)| e.supervised.iter().zip(at).filter(|(supervised, _)| **supervised).map(|(_, row)| *row))
        .collect();
    if counted.is_empty() {
        return Ok(None);
    }
    let count = counted.len();
    Ok(Some((batch, Some(Tensor::from_vec(counted, count, &Device::Cpu)?))))
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

/// The directions found so far. Sites that read the same input have a leader, the first of them, which learns for all.
struct Directions<'a> {
    model: &'a dyn BaseModel,
    method: &'a dyn Method,
    sites: Vec<&'a Site>,
    /// Directions that the method asks for, site by site.
    wanted: Vec<usize>,
    /// Directions whose holding still is waited for.
    needed: Vec<usize>,
    still: Vec<bool>,
    leader: Vec<usize>,
    /// One a site, of which the leaders' are used; none before the first batch.
    learners: Vec<IncrementalPca>,
}

impl<'a> Directions<'a> {
    fn new(model: &'a dyn BaseModel, method: &'a dyn Method, sites: Vec<&'a Site>) -> Result<Self> {
        let wanted: Vec<usize> =
            sites.iter().map(|s| Ok(method.components(s)?.min(s.inputs))).collect::<Result<_>>()?;
        let count = sites.len();
        let (needed, still, leader) = (wanted.clone(), vec![false; count], (0..count).collect());
        Ok(Self { model, method, sites, wanted, needed, still, leader, learners: Vec::new() })
    }

    /// What `record` makes of the inputs of a batch, site by site; it is given a site's place and its input.
    fn recorded<T: Send>(
        &self,
        batch: &Batch,
        rows: Option<Tensor>,
        record: impl Fn(usize, TensorId, &Tensor) -> Option<T> + Sync,
    ) -> Result<Vec<(usize, T)>> {
        let place: HashMap<&str, usize> = self.sites.iter().enumerate().map(|(i, s)| (s.path.as_str(), i)).collect();
        let recorded: Mutex<Vec<(usize, T)>> = Mutex::default();
        let record = |site: &Site, id: TensorId, x: &Tensor| {
            let place = place.get(site.path.as_str());
            if let Some((i, made)) = place.and_then(|&i| Some((i, record(i, id, x)?))) {
                recorded.lock().unwrap_or_else(PoisonError::into_inner).push((i, made));
            }
            Ok(())
        };
        self.model.hidden(batch, &Inference::of(&InputRecorder { rows, record: &record }))?;
        Ok(recorded.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// With the first batch: finds which sites read the same input.
    fn begin(&mut self, batch: &Batch) -> Result<()> {
        if !self.learners.is_empty() {
            return Ok(());
        }
        let mut first: HashMap<TensorId, usize> = HashMap::new();
        for (i, id) in self.recorded(batch, None, |_, id, _| Some(id))? {
            self.leader[i] = *first.entry(id).or_insert(i);
        }
        for (i, &leader) in self.leader.iter().enumerate() {
            self.wanted[leader] = self.wanted[leader].max(self.wanted[i]);
        }
        self.learners = self.leader.iter().map(|&leader| IncrementalPca::new(self.wanted[leader])).collect();
        Ok(())
    }

    /// Looks which directions hold still now, and returns of how many sites they do, and of how many sites.
    fn hold_still(&mut self, threshold: f64) -> (usize, usize) {
        // As in PEFT, a projection whose directions hold still looks away until more of them are needed.
        for i in (0..self.sites.len()).filter(|&i| self.leader[i] == i) {
            self.still[i] = self.learners[i].holds_still(self.needed[i], threshold);
        }
        (self.holding(), self.sites.len())
    }

    fn holding(&self) -> usize {
        self.leader.iter().filter(|&&leader| self.still[leader]).count()
    }

    /// Learns from a batch, where directions do not hold still.
    fn add(&mut self, batch: &Batch, rows: Option<Tensor>) -> Result<()> {
        let looks = |i: usize| self.leader[i] == i && !self.still[i];
        let recorded = self.recorded(batch, rows, |i, _, x| looks(i).then(|| x.clone()))?;
        let mut recorded: HashMap<usize, Tensor> = recorded.into_iter().collect();
        let mut work: Vec<(&mut IncrementalPca, Tensor)> =
            self.learners.iter_mut().enumerate().filter_map(|(i, pca)| Some((pca, recorded.remove(&i)?))).collect();
        Ok(work.par_iter_mut().try_for_each(|(pca, x)| pca.add(x))?)
    }

    /// Once there are directions of all: how many of each the method needs.
    fn allocate(&mut self) -> Result<()> {
        let (count, leader, learners) = (self.sites.len(), &self.leader, &self.learners);
        if !leader.iter().all(|&leader| learners[leader].components().is_some()) {
            return Ok(());
        }
        let shares: Vec<Vec<f64>> = leader.iter().map(|&leader| learners[leader].explained()).collect();
        let all: Vec<(&Site, &[f64])> = self.sites.iter().copied().zip(shares.iter().map(Vec::as_slice)).collect();
        let found = self.method.allocate(&all)?;
        let most = |i: usize| (0..count).filter(|&j| leader[j] == i).map(|j| found[j]).max().unwrap_or(0);
        self.needed = (0..count).map(most).collect();
        Ok(())
    }

    fn finish(mut self) -> Result<CalibrationStats> {
        if self.learners.is_empty() {
            return Err(Error::Settings(
                "no row of the data has a supervised token, so that there is nothing to calibrate on".into(),
            ));
        }
        let leader = &self.leader;
        self.learners
            .par_iter_mut()
            .enumerate()
            .filter(|(i, _)| leader[*i] == *i)
            .try_for_each(|(_, pca)| if pca.components().is_none() { pca.finish() } else { Ok(()) })?;
        let mut stats = CalibrationStats::new();
        for (site, &leader) in self.sites.iter().zip(leader) {
            let pca = &self.learners[leader];
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
}
