//! One projection by hand: for the worked examples in the methods' headers.

use candle_core::{DType, Device, Tensor};
use lorimer_model::{Projection, Site};
use lorimer_tensor::FrozenWeight;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::method::{CalibrationStats, ModuleTensors, ParameterSource};
use crate::step::Step;

/// The output of one projection `weight` (outputs rows of inputs numbers) for one input, with a new adapter of `method` some of whose
/// parameters have been set (by key, row-major). The merged weight has to give the same.
///
/// # Panics
/// Where something does not fit: this is for examples.
pub fn project(method: &str, settings: &str, weight: &[&[f64]], parameters: &[(&str, &[f64])], x: &[f64]) -> Vec<f64> {
    run(method, settings, weight, parameters, x).unwrap_or_else(|e| panic!("{method}: {e}"))
}

/// The same of a method with gates, with an adapter out of a file's tensors (by key, shape and row-major numbers). No weight gives the same.
///
/// # Panics
/// Where something does not fit: this is for examples.
pub fn gated(
    method: &str,
    settings: &str,
    weight: &[&[f64]],
    tensors: &[(&str, &[usize], &[f64])],
    x: &[f64],
) -> Vec<f64> {
    from_file(method, settings, weight, tensors, x).unwrap_or_else(|e| panic!("{method}: {e}"))
}

fn from_file(
    method: &str,
    settings: &str,
    weight: &[&[f64]],
    tensors: &[(&str, &[usize], &[f64])],
    x: &[f64],
) -> Result<Vec<f64>> {
    let wrong = |what: &str| Error::Config(what.into());
    let settings: Map<String, Value> = serde_json::from_str(settings).map_err(|e| wrong(&e.to_string()))?;
    let method = crate::methods::build(method, &settings)?;
    let shape = (weight.len(), x.len());
    let weight = Tensor::from_vec(weight.concat(), shape, &Device::Cpu)?;
    let base = Projection { weight: FrozenWeight::Dense(weight), bias: None };
    let site = Site::new("projection", shape);
    let mut module = ModuleTensors::default();
    for (key, shape, values) in tensors {
        module.tensors.insert((*key).into(), Tensor::from_slice(values, *shape, &Device::Cpu)?);
    }
    let delta = method.attach(&site, &base, &mut ParameterSource::file(&site, DType::F64, &mut module))?;
    let x = Tensor::from_slice(x, (1, x.len()), &Device::Cpu)?;
    let y = base.forward(&x)?;
    let y = (&y + delta.forward(&base, &x, &y, &Step::default())?)?;
    if delta.merged(&base)?.is_ok() {
        return Err(wrong("a weight gives the same"));
    }
    Ok(y.squeeze(0)?.to_vec1::<f64>()?)
}

fn run(method: &str, settings: &str, weight: &[&[f64]], parameters: &[(&str, &[f64])], x: &[f64]) -> Result<Vec<f64>> {
    let wrong = |what: &str| Error::Config(what.into());
    let settings: Map<String, Value> = serde_json::from_str(settings).map_err(|e| wrong(&e.to_string()))?;
    let mut method = crate::methods::build(method, &settings)?;
    let shape = (weight.len(), x.len());
    let weight = Tensor::from_vec(weight.concat(), shape, &Device::Cpu)?;
    let base = Projection { weight: FrozenWeight::Dense(weight), bias: None };
    let site = Site::new("projection", shape);
    let stats = CalibrationStats::new();
    method.resolve(&[&site], &stats)?;
    let delta = method.attach(&site, &base, &mut ParameterSource::start(&site, DType::F64, 0, &stats))?;
    for (key, values) in parameters {
        let (_, var) = delta.trainable().into_iter().find(|(k, _)| k == key).ok_or_else(|| wrong(key))?;
        var.set(&Tensor::from_slice(values, var.shape(), &Device::Cpu)?)?;
    }
    let x = Tensor::from_slice(x, (1, x.len()), &Device::Cpu)?;
    let y = base.forward(&x)?;
    let y = (&y + delta.forward(&base, &x, &y, &Step::default())?)?;
    let merged = delta.merged(&base)?.map_err(|why| wrong(&why.0))?;
    let other = x.matmul(&merged.t()?)?;
    if crate::delta::largest(&(&y - other)?)? > 1e-9 * (1.0 + crate::delta::largest(&y)?) {
        return Err(wrong("the merged weight gives something else"));
    }
    Ok(y.squeeze(0)?.to_vec1::<f64>()?)
}
