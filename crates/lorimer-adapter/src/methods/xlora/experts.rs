//! The experts of a mixture: plain LoRAs, as their files hold them.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use lorimer_model::{ModelShape, Site};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::file::dialects::peft::PREFIX;
use crate::method::Bias;
use crate::methods::lora::{LoraConfig, Start, is_lora};
use crate::part::Part;
use crate::targets::Matcher;

/// A (rank, inputs) and B (outputs, rank) of a projection.
type Factors = (Tensor, Tensor);

/// One expert.
#[derive(Clone, Debug)]
pub(super) struct Expert {
    number: usize,
    config: LoraConfig,
    factors: BTreeMap<String, Factors>,
}

impl Expert {
    /// A plain LoRA, every tensor of which is an A or a B.
    pub(super) fn of(number: usize, part: &Part) -> Result<Self> {
        let name = format!("expert {number} (`{}`)", part.path.display());
        let fail = |why: String| Err(Error::Refused(format!("{name} {why}")));
        let kind = part.config.get("peft_type").and_then(Value::as_str).unwrap_or("nothing known");
        if !is_lora(&part.config, false) {
            let kind: String = if kind == "LORA" { "DoRA".into() } else { kind.chars().take(40).collect() };
            return fail(format!("is of the type {kind}; X-LoRA mixes plain LoRAs"));
        }
        let config = LoraConfig::from_file(&part.config).map_err(|e| Error::Refused(format!("{name}: {e}")))?;
        if config.bias != Bias::None || config.targeting.modules_to_save.as_ref().is_some_and(|m| !m.is_empty()) {
            return fail(
                "trains biases or whole modules (`bias`, `modules_to_save`), of which a mixture has no use".into(),
            );
        }
        if Start::parse(&config.init_lora_weights)?.moves_base() {
            let text =
                "counts from a start that moved the base (`init_lora_weights`); convert it to a plain LoRA first";
            return fail(text.into());
        }
        let mut halves: BTreeMap<String, (Option<Tensor>, Option<Tensor>)> = BTreeMap::new();
        for (key, tensor) in &part.tensors {
            let path = key.strip_prefix(PREFIX).unwrap_or(key);
            let (a, b) = (path.strip_suffix(".lora_A.weight"), path.strip_suffix(".lora_B.weight"));
            match (a, b) {
                (Some(module), _) => halves.entry(module.into()).or_default().0 = Some(tensor.clone()),
                (_, Some(module)) => halves.entry(module.into()).or_default().1 = Some(tensor.clone()),
                _ => return fail(format!("holds `{key}`, which is no part of a plain LoRA")),
            }
        }
        let mut factors = BTreeMap::new();
        for (module, halves) in halves {
            let (Some(a), Some(b)) = halves else { return fail(format!("has only one of A and B of `{module}`")) };
            factors.insert(module, (a, b));
        }
        if factors.is_empty() {
            return fail("holds no tensors".into());
        }
        Ok(Self { number, config, factors })
    }

    /// The modules that it changes.
    pub(super) fn modules(&self) -> impl Iterator<Item = &String> {
        self.factors.keys()
    }

    /// Its rank there; 0 where it changes nothing.
    pub(super) fn rank(&self, module: &str) -> usize {
        self.factors.get(module).and_then(|(a, _)| a.dims().first().copied()).unwrap_or(0)
    }

    /// Refuses an expert of another base, or one that is not whole.
    pub(super) fn check(&self, shape: &ModelShape, sites: &[&Site]) -> Result<()> {
        let number = self.number;
        let fail = |why: String| Err(Error::Mismatch(format!("expert {number} does not fit the base: {why}")));
        let matcher = Matcher::new(&self.config.targeting, sites.iter().copied())?;
        for site in sites {
            let Some((a, b)) = self.factors.get(&site.path) else {
                if matcher.targets(site) {
                    return fail(format!("its configuration names `{}`, of which it has no tensors", site.path));
                }
                continue;
            };
            if site.is_head {
                return Err(Error::Refused(format!(
                    "expert {number} changes `{}`, the head, which PEFT's X-LoRA cannot; train it without",
                    site.path
                )));
            }
            if !matcher.targets(site) {
                return fail(format!("it has tensors of `{}`, which its configuration does not name", site.path));
            }
            let rank = self.config.rank(&site.path)?;
            if a.dims() != [rank, site.inputs] || b.dims() != [site.outputs, rank] {
                return fail(format!(
                    "`{}` has A {:?} and B {:?} at rank {rank}, the base is {} to {} wide",
                    site.path,
                    a.dims(),
                    b.dims(),
                    site.inputs,
                    site.outputs
                ));
            }
        }
        match self.modules().find(|module| !sites.iter().any(|site| site.path == **module)) {
            Some(module) => fail(format!("a `{}` model has no `{module}`", shape.model_type)),
            None => Ok(()),
        }
    }
}

/// All experts' change of one projection as one low-rank product, with what spreads a weight an expert over its ranks.
pub(super) struct Joined {
    /// (Σr, inputs).
    pub(super) a: Tensor,
    /// (outputs, Σr).
    pub(super) b: Tensor,
    /// (n, Σr): `weight` · sᵢ in the columns of expert i.
    pub(super) spread: Tensor,
}

/// The experts of a projection, one after the other.
pub(super) fn join(experts: &[Expert], module: &str, weight: f64, dtype: DType) -> Result<Joined> {
    let (mut a, mut b, mut columns) = (Vec::new(), Vec::new(), Vec::new());
    for (i, expert) in experts.iter().enumerate() {
        let Some((own_a, own_b)) = expert.factors.get(module) else { continue };
        let scale = weight * expert.config.scaling(module)?;
        columns.extend(std::iter::repeat_n((i, scale), own_a.dim(0)?));
        a.push(own_a.to_dtype(dtype)?);
        b.push(own_b.to_dtype(dtype)?);
    }
    if columns.is_empty() {
        return Err(Error::Mismatch(format!("no expert changes `{module}`")));
    }
    let mut spread = vec![0f64; experts.len() * columns.len()];
    for (column, &(i, scale)) in columns.iter().enumerate() {
        spread[i * columns.len() + column] = scale;
    }
    let spread = Tensor::from_vec(spread, (experts.len(), columns.len()), &Device::Cpu)?.to_dtype(dtype)?;
    Ok(Joined { a: Tensor::cat(&a, 0)?.contiguous()?, b: Tensor::cat(&b, 1)?.contiguous()?, spread })
}
