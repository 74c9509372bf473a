//! torch's CPU generator, as far as PEFT's frozen random matrices need it: numbers equal torch's bit for bit.

use candle_core::{DType, Device, Result as TensorResult, Tensor};
use half::bf16;
use rand_mt::Mt;

/// torch's `torch.Generator("cpu").manual_seed(seed)`.
#[derive(Clone)]
pub struct TorchGenerator(Mt);

impl TorchGenerator {
    /// Seeds with the low 32 bits, as torch does.
    pub fn new(seed: u64) -> Self {
        Self(Mt::new(seed as u32))
    }

    /// `torch.rand(shape)` in f32: 24 random bits each.
    pub fn rand(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| (self.0.next_u32() & 0xff_ffff) as f32 / (1u32 << 24) as f32).collect()
    }

    /// Leaves out so many numbers.
    pub fn skip(&mut self, count: usize) {
        for _ in 0..count {
            self.0.next_u32();
        }
    }

    /// `tensor.uniform_(-bound, bound)` on an f32 tensor. What is rounded up to the bound, which does not belong to the range,
    /// becomes its other end.
    pub fn uniform(&mut self, count: usize, bound: f64) -> Vec<f32> {
        let (from, to) = (-bound as f32, bound as f32);
        let one = |x: f32| {
            let v = x * (to - from) + from;
            if v >= to { from } else { v }
        };
        self.rand(count).into_iter().map(one).collect()
    }

    /// `kaiming_uniform_(a = √5)` on an f32 tensor of so many numbers with this fan-in.
    pub fn kaiming(&mut self, count: usize, fan_in: usize) -> Vec<f32> {
        self.uniform(count, kaiming_bound(fan_in))
    }

    /// [`Self::uniform`] on a bf16 tensor: as in f32, then rounded.
    pub fn uniform_bf16(&mut self, count: usize, bound: f64) -> Vec<bf16> {
        let (from, to) = (bf16::from_f32(-bound as f32), bf16::from_f32(bound as f32));
        let one = |v: f32| {
            let v = bf16::from_f32(v);
            if v >= to { from } else { v }
        };
        self.uniform(count, bound).into_iter().map(one).collect()
    }

    /// `kaiming_uniform_(a = √5)` on a bf16 tensor of so many numbers with this fan-in: uniform in ±1/√fan_in.
    pub fn kaiming_bf16(&mut self, count: usize, fan_in: usize) -> Vec<bf16> {
        self.uniform_bf16(count, kaiming_bound(fan_in))
    }
}

/// As torch computes it: gain = √(2/(1 + 5)), std = gain/√fan_in, bound = √3·std.
fn kaiming_bound(fan_in: usize) -> f64 {
    let gain = (2.0f64 / (1.0 + 5f64.sqrt() * 5f64.sqrt())).sqrt();
    3f64.sqrt() * (gain / (fan_in.max(1) as f64).sqrt())
}

/// The values over their standard deviation (n − 1 in the denominator), rounded where torch rounds.
pub fn over_deviation_bf16(values: &[bf16]) -> Vec<bf16> {
    let deviation = bf16::from_f64(deviation(values.iter().map(|v| v.to_f64())));
    values.iter().map(|v| bf16::from_f32(v.to_f32() / deviation.to_f32())).collect()
}

/// As [`over_deviation_bf16`] in f32.
pub fn over_deviation(values: &[f32]) -> Vec<f32> {
    let deviation = deviation(values.iter().map(|v| f64::from(*v))) as f32;
    values.iter().map(|v| v / deviation).collect()
}

fn deviation(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let n = values.clone().count() as f64;
    let mean = values.clone().sum::<f64>() / n;
    (values.map(|v| (v - mean) * (v - mean)).sum::<f64>() / (n - 1.0)).sqrt()
}

/// A bf16 tensor in another type.
pub fn tensor_bf16(values: Vec<bf16>, shape: &[usize], dtype: DType) -> TensorResult<Tensor> {
    Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)
}
