//! `lorimer bench kernels`: a projection from each way of storage, for a few numbers of rows, beside what memory and arithmetic allow.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use clap::Args;
use lorimer_cli::{Global, common};
use lorimer_tensor::FrozenWeight;
use lorimer_tensor::kernels::cpu;
use lorimer_tensor::ops::segmented::{Segmented, project_segmented};
use rayon::prelude::*;
use serde_json::{Value, json};

use crate::measure::{median, sgemm_rate};

/// Bytes that the weights of a measurement have in f32, beyond what caches hold.
const WEIGHTS: usize = 256 << 20;
/// A measurement ends after so many seconds.
const SECONDS: f64 = 0.4;

/// Measure a projection y = x Wᵀ from each way of storage
///
/// The floor is the larger of two times: reading W as it is stored at the rate at which this machine reads f32 numbers, and its arithmetic at the rate of
/// a large f32 product of ours. `int8` may be below it, which computes in whole numbers. LORIMER_CPU lowers what is used of the processor.
#[derive(Args)]
pub struct BenchKernels {
    /// Rows of x; repeatable
    #[arg(long, value_name = "N", default_values_t = [1u32, 4, 16, 64, 256], value_parser = clap::value_parser!(u32).range(1..=65_536))]
    rows: Vec<u32>,
    /// Outputs of W
    #[arg(long, value_name = "N", default_value_t = 1536, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    outputs: u32,
    /// Inputs of W: a multiple of 32
    #[arg(long, value_name = "N", default_value_t = 576, value_parser = clap::value_parser!(u32).range(32..=65_536))]
    inputs: u32,
    /// Only this storage; repeatable [default: all, Q6K where the inputs are a multiple of 256]
    #[arg(long, value_name = "NAME", value_parser = STORAGES)]
    storage: Vec<String>,
}

const STORAGES: [&str; 9] = ["f32", "bf16", "f16", "Q8_0", "Q4_1", "Q6K", "nf4", "int8", "int4"];

/// The weight in a way of storage.
fn stored(name: &str, weight: &Tensor) -> Result<FrozenWeight> {
    let dense = FrozenWeight::Dense(weight.clone());
    let blocks = |kind: GgmlDType| -> Result<FrozenWeight> {
        let quantised = QTensor::quantize(weight, kind)?;
        Ok(FrozenWeight::from_ggml(kind, &quantised.data()?, weight.dims2()?)?)
    };
    Ok(match name {
        "f32" => dense,
        "bf16" => FrozenWeight::Dense(weight.to_dtype(DType::BF16)?),
        "f16" => FrozenWeight::Dense(weight.to_dtype(DType::F16)?),
        "Q8_0" => blocks(GgmlDType::Q8_0)?,
        "Q4_1" => blocks(GgmlDType::Q4_1)?,
        "Q6K" => blocks(GgmlDType::Q6K)?,
        "nf4" => dense.to_nf4()?,
        "int8" => dense.to_panels()?,
        _ => blocks(GgmlDType::Q4_1)?.to_panels()?,
    })
}

/// Bytes a second at which all threads read numbers.
fn bandwidth() -> f64 {
    let numbers = vec![1f32; WEIGHTS / 4];
    let rates = (0..9).map(|_| {
        let clock = Instant::now();
        let sum = |part: &[f32]| {
            let mut lanes = [0f32; 64];
            part.chunks_exact(64).for_each(|c| lanes.iter_mut().zip(c).for_each(|(l, v)| *l += v));
            lanes[0]
        };
        std::hint::black_box(numbers.par_chunks(1 << 16).map(sum).sum::<f32>());
        WEIGHTS as f64 / clock.elapsed().as_secs_f64()
    });
    median(rates.collect())
}

impl BenchKernels {
    /// Does what was asked for and prints it.
    pub fn run(self, global: Global) -> Result<ExitCode> {
        let (outputs, inputs) = (self.outputs as usize, self.inputs as usize);
        if !inputs.is_multiple_of(32) {
            bail!("--inputs {inputs} should be a multiple of 32, which blocks hold");
        }
        if self.storage.iter().any(|s| s == "Q6K") && !inputs.is_multiple_of(256) {
            bail!("--storage Q6K holds blocks of 256 inputs; --inputs {inputs} should be a multiple of that");
        }
        let largest = self.rows.iter().map(|&r| r as usize * outputs.max(inputs)).fold(outputs * inputs, usize::max);
        if largest > WEIGHTS / 4 {
            let most = WEIGHTS / 4;
            bail!(
                "a matrix of {largest} numbers is asked for; at most {most}: give fewer --rows, --outputs or --inputs"
            );
        }
        let names: Vec<&str> =
            STORAGES.into_iter().filter(|n| self.storage.is_empty() || self.storage.iter().any(|s| s == n)).collect();
        let count = (WEIGHTS / 4).div_ceil(outputs * inputs);
        let weights: Vec<Tensor> = (0..count)
            .map(|_| Ok(Tensor::randn(0f32, 0.05, (outputs, inputs), &Device::Cpu)?))
            .collect::<Result<_>>()?;
        let (read, arithmetic) = (bandwidth(), sgemm_rate()? * 1e9);
        let mut lines: Vec<Value> = Vec::new();
        for name in names {
            if name == "Q6K" && !inputs.is_multiple_of(256) {
                continue;
            }
            let all: Vec<FrozenWeight> = weights.iter().map(|w| stored(name, w)).collect::<Result<_>>()?;
            let bytes = all[0].bytes();
            for &rows in &self.rows {
                let x = Tensor::randn(0f32, 1.0, (rows as usize, inputs), &Device::Cpu)?;
                let pass = || -> Result<f64> {
                    let clock = Instant::now();
                    for weight in &all {
                        project_segmented(&x, &[Segmented { weight, bias: None, groups: Vec::new() }])?;
                    }
                    Ok(clock.elapsed().as_secs_f64() / count as f64)
                };
                let (mut times, begun) = (Vec::new(), Instant::now());
                while times.len() < 3 || begun.elapsed().as_secs_f64() < SECONDS {
                    times.push(pass()?);
                }
                let (time, work) = (median(times), 2.0 * (rows as usize * outputs * inputs) as f64);
                let floor = (bytes as f64 / read).max(work / arithmetic);
                lines.push(json!({ "storage": name, "rows": rows, "microseconds": time * 1e6, "bytes_per_second": bytes as f64 / time,
                    "gflops": work / time / 1e9, "floor_share": floor / time }));
            }
        }
        let json = json!({
            "outputs": outputs, "inputs": inputs, "threads": rayon::current_num_threads(), "level": cpu::level().name(),
            "read_bytes_per_second": read, "sgemm_gflops": arithmetic / 1e9, "kernels": lines,
        });
        common::print(global, &json, || {
            let mut out = format!(
                "y = x Wᵀ, W ({outputs}, {inputs}), {} threads, {}: reads {:.1} GB/s, large f32 products {:.0} GFLOP/s\n\n{:<8} {:>6} {:>10} {:>8} {:>10} {:>15}\n",
                rayon::current_num_threads(),
                cpu::level().name(),
                read / 1e9,
                arithmetic / 1e9,
                "storage",
                "rows",
                "µs",
                "GB/s",
                "GFLOP/s",
                "share of floor"
            );
            for line in &lines {
                let number = |key: &str| line[key].as_f64().unwrap_or(f64::NAN);
                out += &format!(
                    "{:<8} {:>6} {:>10.1} {:>8.2} {:>10.1} {:>15.2}\n",
                    line["storage"].as_str().unwrap_or_default(),
                    number("rows"),
                    number("microseconds"),
                    number("bytes_per_second") / 1e9,
                    number("gflops"),
                    number("floor_share")
                );
            }
            out
        })
    }
}
