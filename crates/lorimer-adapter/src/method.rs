//! What a method is: how it attaches to one projection, what it changes there, what it stores.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Result as TensorResult, Tensor, Var};
use lorimer_model::{Projection, Site};
use lorimer_tensor::{Ops, RankGate, SparseIndex};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::file::keys::FileKeys;
use crate::search::DifforaConfig;
use crate::targets::Targeting;
use crate::training::Training;

/// What one forward is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// In training, the seed that dropout masks of this forward come from.
    pub training: Option<u64>,
    /// The rank that this step trains, of methods that have a choice.
    pub rank: Option<SampledRank>,
}

impl Step {
    /// A forward of training with a seed for dropout.
    pub fn training(seed: u64) -> Self {
        Self { training: Some(seed), rank: None }
    }
}

/// A rank drawn for one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampledRank {
    /// The rank.
    pub rank: usize,
    /// Whether only its last row of A and column of B learn.
    pub frozen: bool,
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
    #[serde(alias = "MiSS_only", alias = "bone_only", alias = "randlora_only", alias = "vera_only")]
    LoraOnly,
}

/// Why an adapter has no plain weight that gives the same output.
#[derive(Debug, Clone)]
pub struct NotMergeable(pub String);

/// A product of two low-rank factors: ΔW = scaling · B A.
#[derive(Clone, Debug)]
pub struct LowRank {
    /// (rank, inputs).
    pub a: Tensor,
    /// (outputs, rank).
    pub b: Tensor,
    /// α/r, or what the method has in its place.
    pub scaling: f64,
}

/// A low-rank change whose ranks are gated, row by row: Δy = scaling · b (g ∘ (a x)), with gates g (rank) that [`Delta::gates`] computes from
/// the row's input. No fixed weight gives the same.
#[derive(Clone, Debug)]
pub struct GatedLowRank {
    /// The factors.
    pub factors: LowRank,
    /// Whether gradients go through the change to its input.
    pub input_gradient: bool,
}

/// A changed projection in a form that is computed together with the frozen one.
pub enum Change {
    /// ΔW = scaling · b a.
    LowRank(LowRank),
    /// The same with gates that depend on the input.
    Gated(GatedLowRank),
    /// The whole weight W' (outputs, inputs).
    Weight(Tensor),
}

/// What a method put on one projection.
///
/// Most methods say in [`Self::change`] what they are, as a function of their trainable parameters, and have everything else from
/// the defaults: the forward, the fast form in training, the merged weight, the LoRA that `convert` writes.
pub trait Delta: Send + Sync {
    /// The change as a function of the trainable parameters, in candle's graph; None where it has no such form, and
    /// [`Self::forward`] and [`Self::merged`] are the method's own. `rows`: of the input, for methods that choose by
    /// arithmetic; 0 where the factors themselves are wanted.
    fn change(&self, _base: &Projection, _rows: usize, _step: &Step) -> TensorResult<Option<Change>> {
        Ok(None)
    }
    /// What multiplies the input of the change only, (rows, inputs), where the change is [`Change::LowRank`]: dropout.
    fn mask(&self, _x: &Tensor, _step: &Step) -> TensorResult<Option<Tensor>> {
        Ok(None)
    }
    /// What multiplies the gradient that reaches the change's output (outputs), where the change is [`Change::LowRank`]; the forward knows
    /// nothing of it.
    fn gradient_scale(&self) -> TensorResult<Option<Tensor>> {
        Ok(None)
    }
    /// The change Δy of the projection's output. `x` (rows, inputs), `y` = x Wᵀ (rows, outputs) without
    /// bias, which an adapter may have replaced.
    fn forward(&self, base: &Projection, x: &Tensor, y: &Tensor, step: &Step) -> TensorResult<Tensor> {
        match self.change(base, x.dim(0)?, step)? {
            // The scaling goes onto the low-rank factor, where it costs next to nothing.
            Some(Change::LowRank(LowRank { a, b, scaling })) => {
                let x = self.mask(x, step)?.map_or_else(|| Ok(x.clone()), |mask| x * mask)?;
                let change = (x.matmul(&a.t()?)? * scaling)?.matmul(&b.t()?)?;
                match self.gradient_scale()? {
                    // The same numbers with another gradient.
                    Some(scale) => change.broadcast_mul(&scale)? + change.broadcast_mul(&(1.0 - scale)?)?.detach(),
                    None => Ok(change),
                }
            }
            Some(Change::Gated(GatedLowRank { factors: LowRank { a, b, scaling }, input_gradient })) => {
                let x = self.mask(x, step)?.map_or_else(|| Ok(x.clone()), |mask| x * mask)?;
                let x = if input_gradient { x } else { x.detach() };
                let u = x.matmul(&a.t()?)?;
                let gates = self.gates(&x, &u, step)?;
                ((u * gates)? * scaling)?.matmul(&b.t()?)
            }
            Some(Change::Weight(weight)) => x.matmul(&weight.t()?)? - y,
            None => candle_core::bail!("a method without a form has to bring its forward"),
        }
    }
    /// With [`Change::Gated`]: the gates (rows, rank) of rows with input `x` (rows, inputs) and u = x aᵀ (rows, rank), as a function of these
    /// and of the trainable parameters. In training it also counts what moves buffers ([`Self::after_step`]): computing the same rows of a
    /// step again counts nothing twice.
    fn gates(&self, _x: &Tensor, _u: &Tensor, _step: &Step) -> TensorResult<Tensor> {
        candle_core::bail!("a method with gates has to compute them")
    }
    /// With [`Change::Gated`]: the gates as they are served.
    fn rank_gate(&self) -> TensorResult<Option<Arc<dyn RankGate>>> {
        Ok(None)
    }
    /// Parameters that are not trained but moved by a rule, by their keys in the file. They are saved, and resumed, like trained ones.
    fn buffers(&self) -> Vec<(&'static str, &Var)> {
        Vec::new()
    }
    /// After the optimiser's step: moves the buffers by what the step's forwards counted.
    fn after_step(&self) -> TensorResult<()> {
        Ok(())
    }
    /// The whole output without bias in recorded operations, where that is less work than [`Self::forward`] beside the frozen
    /// projection. It is used in training where this is the only adapter.
    fn output(&self, _ops: Ops<'_>, _base: &Projection, _x: &Tensor, _step: &Step) -> TensorResult<Option<Tensor>> {
        Ok(None)
    }
    /// What the change adds to the output of every row (outputs), where the method works on W x + b.
    fn bias_change(&self, _base: &Projection) -> TensorResult<Option<Tensor>> {
        Ok(None)
    }
    /// Whether the change of a row depends on which other rows are in the batch (dropout does, since its mask goes by the
    /// element), so that rows which sequences share cannot be computed once for all.
    fn rows_are_independent(&self, _step: &Step) -> bool {
        true
    }
    /// The plain weight (outputs, inputs) that gives the same output, in f32 (f64 for f64 adapters).
    fn merged(&self, base: &Projection) -> TensorResult<Result<Tensor, NotMergeable>> {
        let merged = match self.change(base, 0, &Step::default())? {
            Some(Change::LowRank(low)) => {
                let change = (low.b.matmul(&low.a)? * low.scaling)?;
                (base.dense(change.dtype())? + change)?
            }
            Some(Change::Weight(weight)) => weight,
            Some(Change::Gated(_)) => {
                return Ok(Err(NotMergeable("its gates depend on the input, which no fixed weight does".into())));
            }
            None => return Ok(Err(NotMergeable("the method has no plain weight".into()))),
        };
        Ok(Ok(merged.detach()))
    }
    /// Trainable parameters, in a fixed order, by their keys in the file (without `.weight`, where PEFT adds that).
    fn trainable(&self) -> Vec<(&'static str, &Var)>;
    /// What multiplies the optimiser's step of each row of the trainable parameter `key`.
    fn step_scale(&self, _key: &str) -> TensorResult<Option<Tensor>> {
        Ok(None)
    }
    /// The scaling of `lora_A` and `lora_B`, where these two are all that is trained and ΔW = scaling · B A up to a constant.
    fn pair_scaling(&self) -> Option<f64> {
        None
    }
    /// (s b a, o) where the output is `o ∘ (W x) + s b a x` with one factor o (outputs) a row of W: a form that is served beside
    /// others in one batch.
    fn scaled(&self, _base: &Projection) -> TensorResult<Option<(LowRank, Tensor)>> {
        Ok(None)
    }
    /// The change as entries of the weight, where only some are changed.
    fn sparse(&self) -> Option<(Arc<SparseIndex>, Tensor)> {
        None
    }
    /// What is not trained but found from the base, from a seed or from data when the adapter is made, by key. Its hash stands in
    /// `lorimer.json`, so that a file without it is not used on another base.
    fn frozen(&self) -> Vec<(&'static str, &Tensor)> {
        Vec::new()
    }
    /// What the file holds for this module, by key below the module's path, for the base as it is on disk.
    fn stored(&self) -> TensorResult<Vec<(&'static str, Tensor)>> {
        Ok(self.trainable().into_iter().chain(self.buffers()).map(|(key, var)| (key, var.detach())).collect())
    }
    /// Whether the output changes at all.
    fn has_effect(&self, base: &Projection) -> TensorResult<bool> {
        let Ok(merged) = self.merged(base)? else { return Ok(true) };
        let dense = base.dense(merged.dtype())?;
        // What rounding alone can do to a decomposed weight is no effect.
        Ok(largest(&(&merged - &dense)?)? > 1e-6 * largest(&dense)?)
    }
}

/// The largest absolute value.
pub(crate) fn largest(t: &Tensor) -> TensorResult<f64> {
    t.abs()?.flatten_all()?.max(0)?.to_dtype(DType::F64)?.to_scalar::<f64>()
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
        #[serde(rename = "learnt_only")]
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
    /// Gates on all targeted projections, learnt in a search of some steps.
    Search(DifforaConfig),
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
    /// The adapter on one projection, new or out of a file.
    fn attach(&self, site: &Site, base: &Projection, source: &mut ParameterSource<'_>) -> Result<Box<dyn Delta>>;
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

/// Seed for one site, so that neither the order of sites nor threads matter (FNV-1a).
pub fn site_seed(seed: u64, path: &str) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325 ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for byte in path.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash
}
