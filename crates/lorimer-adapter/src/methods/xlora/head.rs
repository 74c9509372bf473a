//! The head of a mixture: from hidden states to a weight for each expert at each projection.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Result as TensorResult, Tensor, Var};
use lorimer_tensor::Ops;
use rand_chacha::ChaCha8Rng;

use super::config::{Init, XloraConfig};
use super::gating::Gating;
use crate::dropout::Dropout;
use crate::error::{Error, Result};
use crate::file::mixture::{HEAD, layer_step};
use crate::method::ParameterSource;
use crate::methods::random::kaiming;
use crate::router::{Router, Routes};
use crate::step::Step;

struct Linear {
    /// Its number in PEFT's file.
    number: usize,
    /// (outputs, inputs).
    weight: Var,
    /// (outputs).
    bias: Var,
}

/// The head with what its numbers stand for.
pub(super) struct Head {
    layers: Vec<Linear>,
    gating: Gating,
    dropout: f64,
    pass_value: f64,
    /// Projections in the order of the numbers.
    sites: Vec<String>,
    experts: usize,
    layerwise: bool,
    bias_only: bool,
    dtype: DType,
}

/// (outputs, inputs) of each layer.
pub(super) fn shapes(config: &XloraConfig, hidden: usize, sites: usize, experts: usize) -> Vec<(usize, usize)> {
    let last = experts * if config.layerwise_scalings { sites } else { 1 };
    let width = |i: usize| if i == 0 { hidden } else { config.xlora_size };
    let outputs = |i: usize| if i + 1 == config.xlora_depth { last } else { config.xlora_size };
    (0..config.xlora_depth).map(|i| (outputs(i), width(i))).collect()
}

impl Head {
    /// A head, new or with a file's tensors.
    pub(super) fn new(
        config: &XloraConfig,
        (hidden, sites, experts): (usize, &[String], usize),
        file: &BTreeMap<String, Tensor>,
        source: &mut ParameterSource<'_>,
    ) -> Result<Self> {
        let (dtype, step) = (source.dtype(), layer_step(config.xlora_dropout_p));
        let shapes = shapes(config, hidden, sites.len(), experts);
        if source.is_file() {
            check_names(file, shapes.len(), step)?;
        } else if config.init == Init::Zero && !config.enable_softmax {
            return Err(Error::Config(
                "enable_softmax = false with a head of zeros gives every expert the weight 0; set init=peft".into(),
            ));
        }
        let mut rng = source.rng();
        let mut layers = Vec::new();
        for (i, &(outputs, inputs)) in shapes.iter().enumerate() {
            let number = i * step;
            let zero = config.init == Init::Zero && i + 1 == shapes.len();
            let mut one = |end: &str, dims: &[usize]| -> Result<Var> {
                let name = format!("{HEAD}{number}.{end}");
                let start = match file.get(&name).filter(|_| source.is_file()) {
                    Some(t) if t.dims() != dims => {
                        let found = t.dims();
                        return Err(Error::Mismatch(format!(
                            "tensor `{name}` has shape {found:?}, configuration, base and experts say {dims:?}"
                        )));
                    }
                    Some(t) => t.clone(),
                    None if zero => Tensor::zeros(dims, dtype, &Device::Cpu)?,
                    None => start(dims, inputs, dtype, &mut rng)?,
                };
                Ok(Var::from_tensor(&start.to_dtype(dtype)?.contiguous()?.detach())?)
            };
            let weight = one("weight", &[outputs, inputs])?;
            layers.push(Linear { number, weight, bias: one("bias", &[outputs])? });
        }
        Ok(Self {
            layers,
            gating: config.gating(),
            dropout: config.xlora_dropout_p,
            pass_value: config.scaling_pass_value,
            sites: sites.to_vec(),
            experts,
            layerwise: config.layerwise_scalings,
            bias_only: config.bias_only,
            dtype,
        })
    }

    fn variables(&self) -> impl Iterator<Item = (String, &Var)> {
        let own = |l: &'_ Linear| [(format!("{}.weight", l.number), 0), (format!("{}.bias", l.number), 1)];
        self.layers.iter().flat_map(move |l| own(l).map(|(name, i)| (name, if i == 0 { &l.weight } else { &l.bias })))
    }

    /// λ (rows, n · projections, or n), before what is not among the k largest is left out.
    fn scalings(&self, hidden: &Tensor, training: Option<u64>) -> TensorResult<Tensor> {
        let step = Step { training, rank: None };
        let mut z = hidden.clone();
        for (i, layer) in self.layers.iter().enumerate() {
            z = z.matmul(&layer.weight.t()?)?.broadcast_add(&layer.bias)?;
            if i + 1 < self.layers.len() {
                z = z.relu()?;
                let dropout = Dropout::new(self.dropout, &format!("{HEAD}{}", layer.number));
                if let Some(mask) = dropout.mask(&z, &step)? {
                    z = (z * mask)?;
                }
            }
        }
        let shape = z.dims2()?;
        self.gating.scalings(&z.reshape(((), self.experts))?)?.reshape(shape)
    }

    /// The gates (rows, n · projections, or n).
    fn gates(&self, hidden: &Tensor, training: Option<u64>) -> TensorResult<Tensor> {
        let scalings = self.scalings(&hidden.to_dtype(self.dtype)?, training)?;
        let shape = scalings.dims2()?;
        self.gating.kept(&scalings.reshape(((), self.experts))?)?.reshape(shape)
    }
}

/// torch's start of a linear layer: weight and bias uniform in ±1/√inputs.
fn start(dims: &[usize], inputs: usize, dtype: DType, rng: &mut ChaCha8Rng) -> TensorResult<Tensor> {
    let outputs = dims.first().copied().unwrap_or(0);
    let all = kaiming((outputs, inputs), dtype, rng)?;
    if dims.len() == 2 { Ok(all) } else { all.narrow(1, 0, 1)?.flatten_all() }
}

/// Refuses a head that has not exactly the layers of its configuration.
fn check_names(file: &BTreeMap<String, Tensor>, depth: usize, step: usize) -> Result<()> {
    let wanted: Vec<String> =
        (0..depth).flat_map(|i| ["bias", "weight"].map(|end| format!("{HEAD}{}.{end}", i * step))).collect();
    let short = |name: &String| name.trim_start_matches("base_model.internal_xlora_classifier.").to_string();
    if let Some(name) = wanted.iter().find(|name| !file.contains_key(*name)) {
        return Err(Error::Mismatch(format!(
            "the head has no `{}`: PEFT 0.20 and 0.21 leave out the head's layers whose numbers are experts' names when they save it; save it with PEFT 0.19",
            short(name)
        )));
    }
    match file.keys().find(|name| !wanted.contains(name)) {
        None => Ok(()),
        Some(name) => Err(Error::Mismatch(format!(
            "the head holds `{}`, which a head of depth {depth} with this dropout has not (PEFT counts ReLU and dropout among its layers)",
            short(name)
        ))),
    }
}

impl Router for Head {
    fn width(&self) -> usize {
        self.experts
    }

    fn trainable(&self) -> Vec<(String, &Var)> {
        let all = self.variables().map(|(name, var)| (format!("internal_xlora_classifier.layers.{name}"), var));
        // The last bias comes last.
        all.skip(if self.bias_only { 2 * self.layers.len() - 1 } else { 0 }).collect()
    }

    fn stored(&self) -> Vec<(String, Tensor)> {
        self.variables().map(|(name, var)| (format!("{HEAD}{name}"), var.as_detached_tensor())).collect()
    }

    fn first_pass(&self) -> TensorResult<Option<Tensor>> {
        if self.pass_value == 0.0 {
            return Ok(None);
        }
        let all = (Tensor::ones((1, self.experts), self.dtype, &Device::Cpu)? * self.pass_value)?;
        self.gating.kept(&all).map(Some)
    }

    fn routes(&self, ops: Ops<'_>, hidden: &Tensor, training: Option<u64>) -> TensorResult<Routes> {
        let (rows, n) = (hidden.dim(0)?, self.experts);
        let parameters: Vec<&Tensor> = self.variables().map(|(_, var)| var.as_tensor()).collect();
        let gates = ops.subgraph(&[], &parameters, |_| self.gates(hidden, training))?;
        let each = match self.layerwise {
            true => ops.split_all(&gates, &vec![n; self.sites.len()])?,
            false => vec![gates; self.sites.len()],
        };
        Ok(Routes::new(self.sites.iter().cloned().zip(each).collect::<HashMap<_, _>>(), rows))
    }

    fn all_routes(&self, hidden: &Tensor) -> TensorResult<Tensor> {
        Ok(self.gates(hidden, None)?.detach())
    }

    fn place(&self, site: &str) -> Option<usize> {
        let number = self.sites.iter().position(|own| own == site)?;
        Some(if self.layerwise { number * self.experts } else { 0 })
    }

    fn rows_are_independent(&self) -> bool {
        self.dropout == 0.0 || self.layers.len() == 1
    }

    fn scalings(&self, hidden: &Tensor) -> TensorResult<Tensor> {
        let rows = hidden.dim(0)?;
        let all = Self::scalings(self, &hidden.to_dtype(self.dtype)?, None)?.detach();
        let sites = if self.layerwise { self.sites.len() } else { 1 };
        all.reshape((rows, sites, self.experts))?.broadcast_as((rows, self.sites.len(), self.experts))?.contiguous()
    }
}
