//! The gradients of frozen weights over some rows, layer by layer from the last.

use std::collections::HashMap;

use candle_core::{Device, Result as TensorResult, Tensor, Var};
use lorimer_adapter::Method;
use lorimer_model::{Adaptation, BaseModel, Frozen, Layout, Projection, Recompute, Site};
use lorimer_tensor::{Gradients, Ops, Tape};

use super::targeted::targeted;
use crate::data::encode::Example;
use crate::error::{Error, Result};

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

/// The weights of one layer's sites (or of those in no layer) as variables, and the gradients of them found so far.
struct LayerGradients<'a> {
    sites: Vec<&'a Site>,
    weights: HashMap<String, Var>,
    sum: Sum,
    found: Gradients,
    /// But for the plain sum, where a batch's gradients go as soon as they are there.
    sums: HashMap<String, Tensor>,
}

impl<'a> LayerGradients<'a> {
    fn new(model: &dyn BaseModel, sites: &[(&'a Site, &Projection)], layer: Option<usize>, sum: Sum) -> Result<Self> {
        let of = || sites.iter().filter(|(site, _)| site.layer == layer);
        let weight = |(site, base): &(&Site, &Projection)| {
            Ok((site.path.clone(), Var::from_tensor(&base.dense(model.dtype())?)?))
        };
        let weights = of().map(weight).collect::<Result<_>>()?;
        let sites = of().map(|(site, _)| *site).collect();
        Ok(Self { sites, weights, sum, found: Gradients::default(), sums: HashMap::new() })
    }

    fn tape(&self) -> Tape {
        Tape::new(self.weights.values().map(Var::as_tensor))
    }

    /// After each batch.
    fn add_up(&mut self) -> TensorResult<()> {
        if self.sum == Sum::Plain {
            return Ok(());
        }
        for (path, weight) in &self.weights {
            let Some(g) = self.found.remove(weight) else { continue };
            let g = if self.sum == Sum::Squares { g.sqr()? } else { g.abs()? };
            let sum = match self.sums.remove(path) {
                Some(sum) => (sum + g)?,
                None => g,
            };
            self.sums.insert(path.clone(), sum);
        }
        Ok(())
    }

    /// Every site with its gradient, zeros where nothing reached it.
    fn finish(mut self) -> TensorResult<Vec<(&'a Site, Tensor)>> {
        let of = self.sites.iter().map(|&site| {
            let weight = &self.weights[&site.path];
            let g = self.sums.remove(&site.path).or_else(|| self.found.remove(weight));
            Ok((site, g.map_or_else(|| weight.zeros_like(), Ok)?))
        });
        of.collect()
    }
}

/// A batch on its way back: the hidden states between its layers, and the gradient that has come down to the next layer.
struct Part {
    layout: Layout,
    again: Recompute,
    gradient: Option<Tensor>,
}

impl Part {
    /// The forward of a batch, and the gradient of its loss before the head; the head's own weights' go to `head`. The loss is the sum over supervised
    /// tokens divided by `total`, or by their own number for [`Sum::Squares`]. None where no token is supervised.
    fn forward(
        model: &dyn BaseModel,
        rows: &[&Example],
        lowest: usize,
        total: usize,
        head: &mut LayerGradients<'_>,
    ) -> Result<Option<Self>> {
        let cut = model.shape().prefixes_stand(rows.iter().map(|e| e.tokens.len()).max().unwrap_or(0));
        let batch = model.shape().batch(rows.iter().map(|e| e.seen(cut)));
        let pairs = rows.iter().zip(&batch.rows);
        let (index, targets): (Vec<u32>, Vec<u32>) =
            pairs.flat_map(|(e, at)| e.targets().map(|i| (at[i - 1], e.tokens[i]))).unzip();
        if targets.is_empty() {
            return Ok(None);
        }
        let layout = model.layout(&batch.positions, &batch.segments, None);
        let blocks = (0..model.shape().layers.len(), lowest);
        let stem = model.embed(&batch.tokens, &batch.positions, &Frozen)?;
        let (again, h) = rayon::scope(|_| Recompute::forward(model, stem, blocks, &layout, &Frozen))?;
        let tape = head.tape();
        tape.track(&h);
        let recorder = GradientRecorder { weights: &head.weights, tape: &tape };
        let last = model.end(&h, &recorder)?;
        let loss = model.loss(&recorder.ops().rows(&last, &index)?, &targets, &recorder)?;
        let count = if head.sum == Sum::Squares { targets.len() } else { total };
        let seed = Tensor::new(1.0 / count as f64, &Device::Cpu)?.to_dtype(loss.dtype())?;
        tape.backward(&loss, seed, &mut head.found)?;
        let gradient = head.found.remove(&h);
        head.add_up()?;
        Ok(Some(Self { layout, again, gradient }))
    }

    /// Back through one layer.
    fn backward(&mut self, model: &dyn BaseModel, layer: &mut LayerGradients<'_>) -> Result<()> {
        let Some(g) = self.gradient.take() else { return Ok(()) };
        let tape = layer.tape();
        let recorder = GradientRecorder { weights: &layer.weights, tape: &tape };
        let (again, layout, found) = (&mut self.again, &self.layout, &mut layer.found);
        self.gradient = rayon::scope(|_| again.backward(model, layout, (&tape, &recorder), g, true, found))?;
        Ok(layer.add_up()?)
    }
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
    let layers = model.shape().layers.len();
    let lowest = sites.iter().filter_map(|(s, _)| s.layer).min().unwrap_or(layers);
    let steps = layers - lowest + 1;
    let total: usize = rows.iter().map(|e| e.targets().count()).sum();
    if total == 0 {
        return Err(Error::Settings(
            "no row of the data has a supervised token, so that there is nothing to calibrate on".into(),
        ));
    }
    let mut head = LayerGradients::new(model, &sites, None, sum)?;
    let mut parts = Vec::new();
    for rows in rows.chunks(batch_size.max(1)) {
        parts.extend(Part::forward(model, rows, lowest, total, &mut head)?);
    }
    on_layer(head.finish()?)?;
    progress(1, steps);
    for i in (lowest..layers).rev() {
        let mut layer = LayerGradients::new(model, &sites, Some(i), sum)?;
        parts.iter_mut().try_for_each(|part| part.backward(model, &mut layer))?;
        on_layer(layer.finish()?)?;
        progress(layers - i + 1, steps);
    }
    Ok(())
}
