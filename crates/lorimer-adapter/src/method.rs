//! What a method is: how it attaches to one projection, what it changes there, what it stores.

use std::collections::BTreeMap;

use candle_core::{DType, Result as TensorResult, Tensor, Var};
use lorimer_model::{ModelShape, Projection, Site};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::block::{BlockDelta, BlockSite};
use crate::delta::{Delta, LowRank};
use crate::error::{Error, Result};
use crate::file::keys::FileKeys;
use crate::part::Part;
use crate::router::Router;
use crate::step::site_seed;
use crate::targets::Targeting;
use crate::training::Training;

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
    #[serde(alias = "MiSS_only", alias = "bone_only", alias = "randlora_only", alias = "vera_only")]
    LoraOnly,
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

/// What calibration found out about a module, by name.
pub type ModuleStats = BTreeMap<String, Tensor>;

/// What calibration found out, by module.
pub type CalibrationStats = BTreeMap<String, ModuleStats>;

/// What a method wants to know of the training data before it is attached.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub enum Calibration {
    /// Nothing.
    Nothing,
    /// Principal directions of every targeted projection's inputs, batch by batch until those that the method needs
    /// ([`Method::allocate`]) hold still.
    Inputs {
        /// Cosine between a direction and what it was a batch ago from which on it holds still.
        threshold: f64,
        /// Only positions whose own token is supervised.
        supervised_only: bool,
        /// Rows of data at a time.
        batch_size: usize,
        /// Batches after which what there is will do.
        max_batches: usize,
    },
    /// The sum of every targeted weight's gradient over this many rows of data, handed to [`Method::reduce_gradients`].
    Gradients {
        /// Rows of data.
        samples: usize,
        /// Rows at a time.
        batch_size: usize,
        /// Sum the gradients' absolute values, batch by batch.
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        absolute: bool,
    },
    /// Gates on all targeted projections, trained in a search of some steps.
    Search(Value),
}

/// Where an adapter on one projection comes from: a start, or a file.
pub struct ParameterSource<'a> {
    site: &'a Site,
    dtype: DType,
    from: From<'a>,
    with_weight: bool,
}

enum From<'a> {
    Start(Box<ChaCha8Rng>, Option<&'a ModuleStats>),
    File(&'a mut ModuleTensors),
}

impl<'a> ParameterSource<'a> {
    /// A new adapter whose random values follow from `seed` and the site.
    pub fn start(site: &'a Site, dtype: DType, seed: u64, stats: &'a CalibrationStats) -> Self {
        let rng = Box::new(ChaCha8Rng::seed_from_u64(site_seed(seed, &site.path)));
        Self { site, dtype, from: From::Start(rng, stats.get(&site.path)), with_weight: false }
    }

    /// What a file holds for the site.
    pub fn file(site: &'a Site, dtype: DType, tensors: &'a mut ModuleTensors) -> Self {
        Self { site, dtype, from: From::File(tensors), with_weight: false }
    }

    /// The same of a file that also brings the weight which the adapter is a change of.
    pub fn with_weight(self) -> Self {
        Self { with_weight: true, ..self }
    }

    /// Whether the file brings the weight which the adapter is a change of.
    pub fn brings_weight(&self) -> bool {
        self.with_weight
    }

    /// The type that the adapter computes in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Whether this is a file.
    pub fn is_file(&self) -> bool {
        matches!(self.from, From::File(_))
    }

    /// What calibration found out about the site; an error where that is needed and missing.
    pub fn found(&self, name: &str) -> Result<&'a Tensor> {
        let found = match &self.from {
            From::Start(_, found) => found.and_then(|f| f.get(name)),
            From::File(_) => None,
        };
        found.ok_or_else(|| Error::Config(format!("`{}` has not been calibrated: `{name}` is missing", self.site.path)))
    }

    /// A trainable parameter: from the file, where a missing one is an error, or as `start` makes it.
    pub fn trainable(
        &mut self,
        key: &str,
        shape: &[usize],
        start: impl FnOnce(&mut ChaCha8Rng) -> Result<Tensor>,
    ) -> Result<Var> {
        let t = match &mut self.from {
            From::Start(rng, _) => start(rng)?,
            From::File(tensors) => tensors
                .take(&self.site.path, key, shape)?
                .ok_or_else(|| Error::Mismatch(format!("tensor `{}.{key}` is missing", self.site.path)))?,
        };
        if !t.dtype().is_float() {
            return Err(Error::Mismatch(format!(
                "tensor `{}.{key}` holds integers where weights are expected",
                self.site.path
            )));
        }
        Ok(Var::from_tensor(&t.to_dtype(self.dtype)?.contiguous()?.detach())?)
    }

    /// A frozen part: from the file where that has it, else as `make` finds it.
    pub fn frozen(&mut self, key: &str, shape: &[usize], make: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
        let given = match &mut self.from {
            From::Start(..) => None,
            From::File(tensors) => tensors.take(&self.site.path, key, shape)?,
        };
        Ok(given.map_or_else(make, Ok)?.to_dtype(self.dtype)?.contiguous()?.detach())
    }

    /// A tensor of the file whose shape is not known beforehand, for the caller to check.
    pub fn any(&mut self, key: &str) -> Result<Option<Tensor>> {
        match &mut self.from {
            From::Start(..) => Ok(None),
            From::File(tensors) => Ok(tensors.tensors.remove(key)),
        }
    }

    /// Random numbers that follow from the run's seed and the site.
    pub fn rng(&mut self) -> ChaCha8Rng {
        match &mut self.from {
            From::Start(rng, _) => ChaCha8Rng::seed_from_u64(rng.random()),
            From::File(_) => ChaCha8Rng::seed_from_u64(site_seed(0, &self.site.path)),
        }
    }

    /// A tensor of the file that need not be there.
    pub fn optional(&mut self, key: &str, shape: &[usize]) -> Result<Option<Tensor>> {
        match &mut self.from {
            From::Start(..) => Ok(None),
            From::File(tensors) => tensors.take(&self.site.path, key, shape),
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
    /// Which of the keys that choose modules PEFT's configuration of this method lacks. Where one is set, a file names its modules
    /// one by one.
    fn peft_lacks(&self) -> &'static [&'static str] {
        &[]
    }
    /// Configuration for `adapter_config.json`, describing what [`Delta::stored`] gives.
    fn stored_config(&self) -> Map<String, Value> {
        self.config()
    }
    /// The configuration as it was given, for training provenance and exact resumption.
    fn config(&self) -> Map<String, Value>;
    /// How it is trained, where that is more than AdamW on the loss of the task.
    fn training(&self) -> Training {
        Training::default()
    }
    /// The rate that training takes unless told otherwise, where these settings want another than the registry's line says.
    fn learning_rate(&self) -> Option<f64> {
        None
    }
    /// What it made of its calibration, for `lorimer.json`.
    fn calibration_report(&self) -> Value {
        Value::Null
    }
    /// Last words on the configuration of a file, when the tensors of its modules are known.
    fn describe(&self, _config: &mut Map<String, Value>, _modules: &BTreeMap<String, Vec<(&'static str, Tensor)>>) {}
    /// What it wants to know of the training data.
    fn calibration(&self) -> Calibration {
        Calibration::Nothing
    }
    /// With [`Calibration::Inputs`]: the most directions that a projection may need.
    fn components(&self, _site: &Site) -> Result<usize> {
        Ok(0)
    }
    /// With [`Calibration::Inputs`]: how many directions each projection needs, from the shares of variance that its
    /// directions explain (falling).
    fn allocate(&self, _explained: &[(&Site, &[f64])]) -> Result<Vec<usize>> {
        Ok(Vec::new())
    }
    /// With [`Calibration::Gradients`]: what to keep of the summed gradient (outputs, inputs) of a frozen weight.
    fn reduce_gradients(&self, _site: &Site, _base: &Projection, _gradient: &Tensor) -> Result<ModuleStats> {
        Ok(ModuleStats::new())
    }
    /// Told once, before anything is attached or loaded, which projections are targeted and what calibration found (nothing
    /// where a file is loaded).
    fn resolve(&mut self, _targeted: &[&Site], _stats: &CalibrationStats) -> Result<()> {
        Ok(())
    }
    /// The names of its tensors in a file. Tensors with other names are refused; none are known where a method is in no file.
    fn file_keys(&self) -> FileKeys {
        FileKeys::default()
    }
    /// A tensor of a file that belongs to a block or to the whole adapter, by full name; whether it is of use. Before [`Self::resolve`].
    fn take_shared(&mut self, _name: &str, _tensor: &Tensor) -> bool {
        false
    }
    /// Tensors that belong to no module, by full name, to be written beside the modules' own.
    fn shared(&self) -> TensorResult<Vec<(String, Tensor)>> {
        Ok(Vec::new())
    }
    /// Whether it is made of other adapters ([`Self::take_parts`]).
    fn mixes(&self) -> bool {
        false
    }
    /// Takes the adapters that this one is made of, in their order, before anything else is asked.
    fn take_parts(&mut self, parts: &[Part]) -> Result<()> {
        match parts.is_empty() {
            true => Ok(()),
            false => {
                Err(Error::Refused(format!("`{}` is not made of other adapters; leave --adapter out", self.name())))
            }
        }
    }
    /// The adapters that this one is made of. Where there are any, what it puts on projections comes out of them, and a file has no tensors
    /// for these.
    fn parts(&self) -> &[Part] {
        &[]
    }
    /// Told which base it is for and what projections that has, before it is asked for its targets.
    fn bind(&mut self, _shape: &ModelShape, _sites: &[&Site]) -> Result<()> {
        Ok(())
    }
    /// What is computed once a forward for all projections, new or out of a file; after [`Self::resolve`].
    fn router(&self, _source: &mut ParameterSource<'_>) -> Result<Option<Box<dyn Router>>> {
        Ok(None)
    }
    /// Number of the router's trainable parameters over so many projections of a base of some hidden width; None where the method has none.
    fn router_parameters(&self, _hidden: usize, _sites: usize) -> Option<usize> {
        None
    }
    /// The adapter on one projection, new or out of a file.
    fn attach(&self, site: &Site, base: &Projection, source: &mut ParameterSource<'_>) -> Result<Box<dyn Delta>>;
    /// What it does to whole blocks, if it does: a layer that follows each block's attention.
    fn blocks(&self) -> Option<&dyn BlockMethod> {
        None
    }
    /// Number of trainable parameters on a projection: the formula of the method's header.
    fn parameters(&self, site: &Site) -> Result<usize>;
    /// Whether, in training, the output of a row depends on that row alone: see [`Delta::rows_are_independent`].
    fn rows_are_independent(&self) -> bool {
        true
    }
    /// Why its changes may not be summed or scaled, if they may not.
    fn not_additive(&self) -> Option<&'static str> {
        None
    }
    /// Floats that training keeps for each row of a projection's input until the backward, beside the input itself: for the
    /// plan of a run. The default is what [`Delta::forward`] keeps as a graph of some operations.
    fn activations_per_row(&self, site: &Site) -> usize {
        2 * site.inputs + 5 * site.outputs
    }
    /// Floats that training keeps of a projection however many rows there are, beside the trainable parameters.
    fn activations_fixed(&self, _site: &Site) -> usize {
        0
    }
    /// Figures of a module in a file that only this method has, for `inspect`.
    fn remarks(&self, _tensors: &BTreeMap<String, Tensor>) -> Result<Vec<(String, f64)>> {
        Ok(Vec::new())
    }
    /// α of a module, where the method scales by α over the rank.
    fn low_rank_alpha(&self, _module: &str) -> Result<Option<f64>> {
        Ok(None)
    }
    /// The low-rank change of a module in a file, where the method has one that needs no base.
    fn low_rank(&self, _module: &str, _tensors: &BTreeMap<String, Tensor>) -> Result<Option<LowRank>> {
        Ok(None)
    }
}

/// What a method does to whole blocks.
pub trait BlockMethod {
    /// The name of its module in each block, below the block's own path: what its keys in a file begin with.
    fn module(&self) -> &'static str;
    /// The layer on one block, new or out of a file; None where the block is left alone.
    fn attach(&self, block: &BlockSite, source: &mut ParameterSource<'_>) -> Result<Option<Box<dyn BlockDelta>>>;
    /// Why its changes are none of weights: the end of "it cannot be merged: …".
    fn what(&self) -> &'static str {
        "it is a layer after each attention, and no change of the base's weights"
    }
    /// Whether [`Self::attach`] gives this block a layer.
    fn targets(&self, layer: usize) -> bool;
    /// Number of trainable parameters on a block: the formula of the method's header.
    fn parameters(&self, block: &BlockSite) -> usize;
    /// Floats that training keeps for each row of a block until the backward.
    fn activations_per_row(&self, block: &BlockSite) -> usize;
}

/// Refuses what cannot be done with a method that changes blocks: `what` is the end of "… cannot be".
pub(crate) fn refuse_blocks(method: &dyn Method, what: &str) -> Error {
    let why = method.blocks().map_or("it changes blocks", |own| own.what());
    Error::Refused(format!("a `{}` adapter cannot be {what}: {why}", method.name()))
}
