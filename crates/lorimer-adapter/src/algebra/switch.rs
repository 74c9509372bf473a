//! Changing the adapter under one base in memory: entries of its weights are overwritten in place and written back, so that a switch
//! multiplies nothing and the base comes back bit for bit however often one switches (SHiRA, arXiv 2406.13175, section 3.2).

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use lorimer_model::{BaseModel, Projection, Site};
use lorimer_tensor::FrozenWeight;
use lorimer_tensor::ops::sparse::{exchange_entries, write_entries};
use rayon::prelude::*;
use serde::Serialize;

use crate::adapter::Adapter;
use crate::delta::{Change, Delta};
use crate::error::{Error, Result};
use crate::method::refuse_blocks;
use crate::step::Step;

/// The entries that an adapter changes, ready to be written.
#[derive(Clone, Debug)]
pub struct Entries {
    /// By the projection's path.
    modules: Vec<Module>,
}

#[derive(Clone, Debug)]
struct Module {
    path: String,
    /// Inputs of the projection.
    width: u32,
    /// Flat, rising.
    positions: Arc<Vec<u32>>,
    values: Vec<f32>,
}

/// What two adapters have in common.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Overlap {
    /// Entries that both change.
    pub shared: usize,
    /// Those over the entries of the smaller adapter.
    pub share: f64,
    /// ‖S₁ᵀS₂‖ over ‖S₁‖·‖S₂‖ (Frobenius, over all modules): 0 where their changes are orthogonal.
    pub interference: f64,
}

impl Entries {
    /// Of an adapter whose every change is some entries of a weight.
    ///
    /// # Errors
    ///
    /// Fails if the adapter changes anything but some entries of weights.
    pub fn of(model: &dyn BaseModel, adapter: &Adapter) -> Result<Self> {
        let name = adapter.method.name();
        if adapter.blocks().next().is_some() {
            return Err(refuse_blocks(adapter.method.as_ref(), "switched in place"));
        }
        if !adapter.parameters().is_empty() {
            return Err(Error::Refused(format!(
                "the `{name}` adapter brings whole parameters, which cannot be switched in place"
            )));
        }
        let module = |(site, base, delta): (&Site, &Projection, &dyn Delta)| {
            let Change::Sparse(index, values) = delta.change(base, 0, &Step::default())? else {
                return Err(Error::Refused(format!(
                    "a `{name}` adapter changes whole weights; only sparse ones (shira) are switched in place, others with `lorimer merge` or --adapter"
                )));
            };
            let values = values.detach().to_dtype(DType::F32)?.to_vec1::<f32>()?;
            // A file in PEFT's form may be filled up with zeros.
            let all = index.flat().into_iter().zip(values).filter(|(_, v)| *v != 0.0);
            let (positions, values): (Vec<u32>, Vec<f32>) = all.unzip();
            let width = index.shape().1 as u32;
            Ok(Module { path: site.path.clone(), width, positions: Arc::new(positions), values })
        };
        Ok(Self { modules: adapter.sites(model).into_iter().map(module).collect::<Result<_>>()? })
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.modules.iter().map(|m| m.positions.len()).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What this and another have in common.
    pub fn overlap(&self, other: &Self) -> Overlap {
        let others: HashMap<&str, &Module> = other.modules.iter().map(|m| (m.path.as_str(), m)).collect();
        let mut found = Overlap::default();
        let square = |e: &Self| e.modules.iter().flat_map(|m| &m.values).map(|v| f64::from(*v).powi(2)).sum::<f64>();
        let mut product = 0.0;
        for a in &self.modules {
            let Some(b) = others.get(a.path.as_str()) else { continue };
            found.shared += a.positions.iter().filter(|p| b.positions.binary_search(p).is_ok()).count();
            product += product_norm(a, b);
        }
        found.share = found.shared as f64 / self.len().min(other.len()).max(1) as f64;
        let norms = (square(self) * square(other)).sqrt();
        found.interference = if norms > 0.0 { product.sqrt() / norms } else { 0.0 };
        found
    }
}

/// ‖S₁ᵀS₂‖² of one module: each pair of entries in one row adds to one number of the product.
fn product_norm(a: &Module, b: &Module) -> f64 {
    let rows = |m: &Module| {
        let mut rows: HashMap<u32, Vec<(u32, f32)>> = HashMap::new();
        for (p, v) in m.positions.iter().zip(&m.values) {
            rows.entry(p / m.width.max(1)).or_default().push((p % m.width.max(1), *v));
        }
        rows
    };
    let (of_a, of_b) = (rows(a), rows(b));
    let mut product: HashMap<(u32, u32), f64> = HashMap::new();
    for (row, own) in &of_a {
        for (i, x) in own {
            for (j, y) in of_b.get(row).map(Vec::as_slice).unwrap_or_default() {
                *product.entry((*i, *j)).or_default() += f64::from(*x) * f64::from(*y);
            }
        }
    }
    product.values().map(|v| v * v).sum()
}

/// A base in memory whose adapter changes.
pub struct Switcher<'m> {
    model: &'m mut dyn BaseModel,
    /// What is to be written back, the latest last.
    undo: Vec<Undo>,
}

struct Undo {
    modules: Vec<(String, Arc<Vec<u32>>, Vec<f32>)>,
}

fn weight<'a>(sites: &HashMap<&str, &'a Projection>, path: &str) -> Result<&'a Tensor> {
    match sites.get(path).map(|p| &p.weight) {
        Some(FrozenWeight::Dense(t)) => Ok(t),
        Some(_) => Err(Error::Refused(format!(
            "`{path}` is quantised, and its entries cannot be written one by one; load the base with --dtype f32 or bf16"
        ))),
        None => Err(Error::Mismatch(format!("the base has no `{path}`"))),
    }
}

impl<'m> Switcher<'m> {
    /// Over a base that nobody else uses meanwhile.
    pub fn new(model: &'m mut dyn BaseModel) -> Self {
        Self { model, undo: Vec::new() }
    }

    /// The base as it is now, to run.
    pub fn model(&self) -> &dyn BaseModel {
        self.model
    }

    /// Takes all adapters off: the base is what it was, bit for bit.
    ///
    /// # Errors
    ///
    /// Fails if an entry cannot be written back; the base then still holds a part of the adapters.
    pub fn clear(&mut self) -> Result<()> {
        let sites = sites(self.model);
        while let Some(undo) = self.undo.pop() {
            undo.modules
                .par_iter()
                .try_for_each(|(path, at, old)| Ok::<_, Error>(write_entries(weight(&sites, path)?, at, old)?))?;
        }
        Ok(())
    }

    /// Puts an adapter on top of what is there, times `scale`.
    ///
    /// # Errors
    ///
    /// Fails, before anything is written, if the base lacks a weight, keeps it quantised, or an entry lies outside it.
    pub fn add(&mut self, entries: &Entries, scale: f64) -> Result<()> {
        let sites = sites(self.model);
        let one = |m: &Module| -> Result<(String, Arc<Vec<u32>>, Vec<f32>)> {
            let mut old = vec![0f32; m.positions.len()];
            exchange_entries(weight(&sites, &m.path)?, &m.positions, &m.values, scale as f32, &mut old)?;
            Ok((m.path.clone(), m.positions.clone(), old))
        };
        // Refused before anything is written.
        for m in &entries.modules {
            let w = weight(&sites, &m.path)?;
            if m.positions.last().is_some_and(|&p| p as usize >= w.elem_count()) {
                return Err(Error::Mismatch(format!("an entry of `{}` is outside the base's weight", m.path)));
            }
        }
        let modules = entries.modules.par_iter().map(one).collect::<Result<Vec<_>>>()?;
        self.undo.push(Undo { modules });
        Ok(())
    }

    /// One adapter in the place of all that is there.
    ///
    /// # Errors
    ///
    /// Fails as [`Self::clear`] and [`Self::add`] do; if it is the second, the base is left without an adapter.
    pub fn switch(&mut self, to: &Entries) -> Result<()> {
        self.clear()?;
        self.add(to, 1.0)
    }
}

impl Drop for Switcher<'_> {
    fn drop(&mut self) {
        // The base is handed back as it was.
        if let Err(error) = self.clear() {
            tracing::error!("the base could not be restored: {error}");
        }
    }
}

fn sites(model: &dyn BaseModel) -> HashMap<&str, &Projection> {
    model.projections().into_iter().map(|(site, base)| (site.path.as_str(), base)).collect()
}
