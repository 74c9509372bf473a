//! What a method is: how it attaches to one projection, what it changes there, what it stores.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor, Var};
use lorimer_model::{Projection, Site};
use lorimer_tensor::LowRankTerm;
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::targets::Targeting;

/// What one forward is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// In training, the seed that dropout masks of this forward come from.
    pub training: Option<u64>,
}

/// Which biases are trained: PEFT's `bias`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bias {
    /// None.
    #[default]
    None,
    /// All that the base has.
    All,
    /// Those of adapted projections.
    LoraOnly,
}

/// Why an adapter has no plain weight that gives the same output.
#[derive(Debug, Clone)]
pub struct NotMergeable(pub String);

/// A product of two thin matrices: ΔW = scaling · B A.
#[derive(Clone, Debug)]
pub struct LowRank {
    /// (rank, inputs).
    pub a: Tensor,
    /// (outputs, rank).
    pub b: Tensor,
    /// α/r, or what the method has in its place.
    pub scaling: f64,
}

/// What a method put on one projection.
pub trait Delta: Send + Sync {
    /// The change Δy of the projection's output. `x` (rows, inputs), `y` = x Wᵀ (rows, outputs) without
    /// bias, which an adapter may have replaced.
    fn forward(&self, base: &Projection, x: &Tensor, y: &Tensor, step: &Step) -> candle_core::Result<Tensor>;
    /// The change as one product of trainable thin matrices, where it is nothing else in this step. In training, and where
    /// this is the only adapter, it is then computed in one operation with the frozen projection, in place of
    /// [`Self::forward`], which it equals. `x` (rows, inputs).
    fn thin(&self, _x: &Tensor, _step: &Step) -> candle_core::Result<Option<LowRankTerm<'_>>> {
        Ok(None)
    }
    /// Whether the change of a row depends on which other rows are in the batch (dropout does, since its mask goes by the
    /// element), so that rows which sequences share cannot be computed once for all.
    fn rows_are_independent(&self, _step: &Step) -> bool {
        true
    }
    /// The plain weight (outputs, inputs) that gives the same output, in f32 (f64 for f64 adapters).
    fn merged(&self, base: &Projection) -> candle_core::Result<Result<Tensor, NotMergeable>>;
    /// Trainable parameters, in a fixed order, by PEFT's parameter names.
    fn trainable(&self) -> Vec<(&'static str, &Var)>;
    /// What the file holds for this module, by key below the module's path, for the base as it is on disk.
    fn stored(&self) -> candle_core::Result<Vec<(&'static str, Tensor)>>;
    /// Whether the output changes at all.
    fn has_effect(&self, base: &Projection) -> candle_core::Result<bool> {
        let Ok(merged) = self.merged(base)? else { return Ok(true) };
        let largest = |t: Tensor| -> candle_core::Result<f64> {
            t.abs()?.flatten_all()?.max(0)?.to_dtype(DType::F64)?.to_scalar::<f64>()
        };
        let dense = base.dense(merged.dtype())?;
        // What rounding alone can do to a decomposed weight is no effect.
        Ok(largest((&merged - &dense)?)? > 1e-6 * largest(dense)?)
    }
}

/// Tensors of one module in an adapter file, by the key below the module's path; taking one accounts for it.
#[derive(Debug, Default)]
pub struct ModuleTensors {
    /// What is left.
    pub tensors: BTreeMap<String, Tensor>,
}

impl ModuleTensors {
    /// Takes a tensor, checking its shape.
    pub fn take(&mut self, site: &str, key: &str, shape: &[usize]) -> Result<Option<Tensor>> {
        match self.tensors.remove(key) {
            Some(t) if t.dims() == shape => Ok(Some(t)),
            Some(t) => Err(Error::Mismatch(format!(
                "tensor `{site}.{key}` has shape {:?}, the configuration and the base say {shape:?}",
                t.dims()
            ))),
            None => Ok(None),
        }
    }
}

/// A method with its configuration.
pub trait Method: Send + Sync {
    /// Name in the registry.
    fn name(&self) -> &'static str;
    /// Which modules it touches.
    fn targeting(&self) -> &Targeting;
    /// Which biases are trained.
    fn bias(&self) -> Bias {
        Bias::None
    }
    /// Configuration for `adapter_config.json`, describing what [`Delta::stored`] gives.
    fn stored_config(&self) -> Map<String, Value>;
    /// The configuration as it was given, for training provenance and exact resumption.
    fn config(&self) -> Map<String, Value>;
    /// A new adapter on one projection.
    fn attach(&self, site: &Site, base: &Projection, dtype: DType, rng: &mut ChaCha8Rng) -> Result<Box<dyn Delta>>;
    /// An adapter out of a file; `None` if the module has no tensors there.
    fn load(
        &self,
        site: &Site,
        base: &Projection,
        dtype: DType,
        tensors: &mut ModuleTensors,
    ) -> Result<Option<Box<dyn Delta>>>;
    /// Number of trainable parameters on a projection: the formula of the method's header.
    fn parameters(&self, site: &Site) -> Result<usize>;
    /// Whether, in training, the output of a row depends on that row alone: see [`Delta::rows_are_independent`].
    fn rows_are_independent(&self) -> bool {
        true
    }
    /// Floats that training keeps for each row of a projection's input until the backward, beside the input itself: for the
    /// plan of a run. The default is what [`Delta::forward`] keeps as a graph of some operations.
    fn kept(&self, site: &Site) -> usize {
        2 * site.inputs + 5 * site.outputs
    }
    /// The low-rank change of a module in a file, where the method has one that needs no base.
    fn low_rank(&self, module: &str, tensors: &BTreeMap<String, Tensor>) -> Result<Option<LowRank>>;
}

/// Seed for one site, so that neither the order of sites nor threads matter (FNV-1a).
pub fn site_seed(seed: u64, path: &str) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325 ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for byte in path.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash
}

/// `given` over the serialised defaults of a configuration; a key that is in neither is an error that lists the known.
pub fn configure<T: Default + serde::Serialize + serde::de::DeserializeOwned>(
    method: &str,
    given: &Map<String, Value>,
) -> Result<T> {
    let broken = |e: serde_json::Error| Error::Config(format!("the configuration of `{method}` is not valid: {e}"));
    let mut all = match serde_json::to_value(T::default()).map_err(broken)? {
        Value::Object(map) => map,
        _ => Map::new(),
    };
    for (key, value) in given {
        if !all.contains_key(key) {
            let known: Vec<_> = all.keys().map(String::as_str).collect();
            let key: String = key.chars().take(60).collect();
            return Err(Error::Config(format!("`{method}` has no setting `{key}`; it has {}", known.join(", "))));
        }
        all.insert(key.clone(), value.clone());
    }
    serde_json::from_value(Value::Object(all)).map_err(broken)
}
