//! Matrices in 4 bits with a scale and a zero point a group of inputs, as GPTQ's and AWQ's checkpoints have them.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use lorimer_model::Site;
use lorimer_model::weights::SafetensorsFile;
use lorimer_model::weights::packed::{GptqFormat, awq_tensors, gptq_tensors, packed_weight};
use lorimer_tensor::storage::affine::{Affine, round_to_nearest};
use serde_json::{Value, json};

use super::gptq;
use super::job::{CalibrationData, GroupedModule, ModuleConfig, ModuleReport, Partial, Quantize, Stage};
use super::sequential::Sequential;
use super::settings::{Format, Groups, Method, QuantizeSettings};
use crate::error::{Error, Result};

/// Numbers in 32 bits, by which a matrix's sides are packed.
const PACK: usize = 8;

/// Refuses matrices that groups do not divide.
pub(super) fn check(sites: &[Site], groups: Groups) -> Result<()> {
    for Site { path, inputs, outputs, .. } in sites {
        if !inputs.is_multiple_of(PACK) || !outputs.is_multiple_of(PACK) {
            return Err(Error::Settings(format!(
                "`{path}` has shape ({outputs}, {inputs}), and the formats gptq and awq pack multiples of {PACK}"
            )));
        }
        if groups.size.is_some_and(|size| !inputs.is_multiple_of(size)) {
            let divide = |size: &&usize| sites.iter().all(|site| site.inputs.is_multiple_of(**size));
            let known = [128, 64, 32, 16, 8].iter().filter(divide).map(|size| format!("{size}, ")).collect::<String>();
            return Err(Error::Settings(format!(
                "groups of {} do not divide the {inputs} inputs of `{path}`; pass --group-size {known}or -1 for whole rows",
                groups.size.unwrap_or_default()
            )));
        }
    }
    Ok(())
}

/// GPTQ's first format has a zero point of 0 in as many ways as it has readers, so that only symmetric groups are written in it.
fn gptq_format(groups: Groups) -> GptqFormat {
    if groups.symmetric { GptqFormat::First } else { GptqFormat::Second }
}

/// What `config.json` says of the weights, with the keys of gptqmodel and AutoAWQ.
pub(super) fn quantization_config(settings: &QuantizeSettings, groups: Groups) -> Value {
    let size = groups.size.map_or(-1, |size| size as i64);
    let rounding = settings.method.name();
    let meta = json!({ "quantizer": [concat!("lorimer:", env!("CARGO_PKG_VERSION"))], "rounding": rounding });
    let mut config = match settings.format {
        Format::Awq => json!({
            "quant_method": "awq", "bits": 4, "group_size": size, "zero_point": true, "version": "gemm",
            "modules_to_not_convert": null,
        }),
        _ => json!({
            "quant_method": "gptq", "bits": 4, "group_size": size, "desc_act": false, "sym": groups.symmetric, "lm_head": false, "pack_dtype": "int32",
            "checkpoint_format": if gptq_format(groups) == GptqFormat::First { "gptq" } else { "gptq_v2" },
        }),
    };
    if settings.method == Method::Gptq && settings.format == Format::Gptq {
        config["damp_percent"] = gptq::DAMPING.into();
    }
    config["meta"] = meta;
    config
}

impl Quantize<'_> {
    /// Rounds every matrix; false where `stop` was set.
    pub(super) fn round(
        &self,
        sites: &[Site],
        groups: Groups,
        partial: &Partial,
        progress: &mut impl FnMut(Stage, usize, usize),
    ) -> Result<bool> {
        match &self.calibration {
            Some(data) if self.settings.method == Method::Gptq => {
                self.round_by_inputs(sites, groups, data, partial, progress)
            }
            _ => self.each_matrix(sites, partial, progress, |i, site| {
                let w = self.weight(site)?;
                let values = w.flatten_all()?.to_vec1::<f32>()?;
                let shape = (site.outputs, site.inputs);
                let size = groups.size.unwrap_or(site.inputs);
                let rounded =
                    round_to_nearest(&values, shape, size, groups.symmetric).map_err(|e| named(site, e.into()))?;
                let error = |values: &[f32]| values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
                let lost: Vec<f32> = values.iter().zip(rounded.expanded()).map(|(w, q)| w - q).collect();
                let (whole, lost) = (error(&values), error(&lost));
                self.keep(i, site, groups, &rounded, (lost, lost, whole), partial)
            }),
        }
    }

    /// As GPTQ does, with the inputs of `data`.
    fn round_by_inputs(
        &self,
        sites: &[Site],
        groups: Groups,
        data: &CalibrationData<'_>,
        partial: &Partial,
        progress: &mut impl FnMut(Stage, usize, usize),
    ) -> Result<bool> {
        let numbers: BTreeMap<&str, usize> = sites.iter().enumerate().map(|(i, s)| (s.path.as_str(), i)).collect();
        let is_there = |i: usize| partial.report(i).is_file();
        let missing = (0..sites.len()).filter(|&i| !is_there(i));
        let Some(last) = missing.filter_map(|i| sites[i].layer).max() else { return Ok(true) };
        let mut model = Sequential::new(data.base.model(), &data.rows, self.stop)?;
        let mut done = 0;
        for layer in 0..=last {
            for paths in model.inputs_of(layer)? {
                let together: Vec<usize> =
                    paths.iter().filter_map(|path| numbers.get(path.as_str()).copied()).collect();
                progress(Stage::Decompose, done, sites.len());
                if let Some(&first) = together.iter().find(|&&i| !is_there(i)) {
                    let Some(mean) = model.mean(layer, &sites[first].path, sites[first].inputs)? else {
                        return Ok(false);
                    };
                    for &i in together.iter().filter(|&&i| !is_there(i)) {
                        self.by_inputs(i, &sites[i], groups, &mean, partial)?;
                    }
                }
                for &i in &together {
                    let file = SafetensorsFile::open(&partial.tensors(i))?;
                    let config = quantization_config(&self.settings, groups);
                    model.put(&sites[i].path, packed_weight(&file, &config, &sites[i].weight_path())?);
                }
                done += together.len();
            }
            if layer < last && !model.advance(layer)? {
                return Ok(false);
            }
        }
        match (0..sites.len()).find(|&i| !is_there(i)) {
            Some(i) => Err(Error::Settings(format!("`{}` was not reached by any row", sites[i].path))),
            None => Ok(true),
        }
    }

    /// Rounds one matrix whose inputs have `mean x xᵀ` = `mean`.
    fn by_inputs(&self, i: usize, site: &Site, groups: Groups, mean: &Tensor, partial: &Partial) -> Result<()> {
        let w = self.weight(site)?;
        let values = w.flatten_all()?.to_vec1::<f32>()?;
        let (shape, size) = ((site.outputs, site.inputs), groups.size.unwrap_or(site.inputs));
        let rounded = gptq::round(&values, shape, mean, size, groups.symmetric).map_err(|e| named(site, e))?;
        let nearest = round_to_nearest(&values, shape, size, groups.symmetric)?;
        let lost = |rounded: &Affine| -> Result<f64> {
            gptq::squared(&(&w - Tensor::from_vec(rounded.expanded(), shape, &Device::Cpu)?)?, mean)
        };
        let errors = (lost(&rounded)?, lost(&nearest)?, gptq::squared(&w, mean)?);
        self.keep(i, site, groups, &rounded, errors, partial)
    }

    /// Keeps a matrix. `errors`: squared, of what is kept, of the nearest, and of all that there is.
    fn keep(
        &self,
        i: usize,
        site: &Site,
        groups: Groups,
        rounded: &Affine,
        (squared, nearest, whole): (f64, f64, f64),
        partial: &Partial,
    ) -> Result<()> {
        let tensors = match self.settings.format {
            Format::Awq => awq_tensors(&site.path, rounded)?,
            _ => gptq_tensors(&site.path, rounded, gptq_format(groups))?,
        };
        let bytes: usize = tensors.iter().map(|(_, t)| t.elem_count() * t.dtype().size_in_bytes()).sum();
        let shape = (site.outputs, site.inputs);
        let relative = |error: f64| if whole > 0.0 { (error / whole).sqrt() } else { 0.0 };
        let report = ModuleReport {
            module: site.path.clone(),
            config: ModuleConfig::Grouped(GroupedModule {
                shape,
                num_bits: 4,
                group_size: groups.size.unwrap_or(site.inputs),
                sym: groups.symmetric,
            }),
            bits: bytes as f64 * 8.0 / (shape.0 * shape.1).max(1) as f64,
            error: relative(squared),
            plain: relative(nearest),
            steps: 0,
            squared,
            bytes: bytes as u64,
        };
        partial.keep(i, tensors, &report)
    }
}

/// An error of rounding says of which matrix.
fn named(site: &Site, error: Error) -> Error {
    Error::Settings(format!("`{}` cannot be rounded: {error}", site.path))
}
