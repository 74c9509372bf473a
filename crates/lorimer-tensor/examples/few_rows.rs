//! Time of all frozen products of one forward of SmolLM2-135M's shapes, in f32, in whole numbers (8 bits, and 4 as Q4_1 has them) and from Q4_1's blocks, for numbers
//! of rows as decoding and prompts have them: `cargo run --release -p lorimer-tensor --example few_rows`. The best of seven; random weights.

use std::time::Instant;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Result, Tensor};
use lorimer_tensor::{FrozenWeight, Segmented, project_segmented};

const LAYERS: usize = 30;
const HIDDEN: usize = 576;
const INNER: usize = 1536;
const KEYS: usize = 192;
const VOCABULARY: usize = 49_152;

/// How weights are kept.
#[derive(Clone, Copy)]
enum Kept {
    F32,
    Int8,
    Int4,
    Stored,
}

fn weight((outputs, inputs): (usize, usize), kept: Kept) -> Result<FrozenWeight> {
    let dense = Tensor::rand(-1f32, 1.0, (outputs, inputs), &Device::Cpu)?;
    match kept {
        Kept::F32 => Ok(FrozenWeight::Dense(dense)),
        Kept::Int8 => FrozenWeight::Dense(dense).to_panels(),
        Kept::Int4 | Kept::Stored => {
            let blocks = QTensor::quantize(&dense, GgmlDType::Q4_1)?;
            let blocks = FrozenWeight::from_ggml(GgmlDType::Q4_1, &blocks.data()?, (outputs, inputs))?;
            if matches!(kept, Kept::Int4) { blocks.to_panels() } else { Ok(blocks) }
        }
    }
}

fn project(x: &Tensor, weights: &[FrozenWeight]) -> Result<()> {
    let parts: Vec<_> = weights.iter().map(|weight| Segmented { weight, bias: None, groups: vec![] }).collect();
    project_segmented(x, &parts).map(|_| ())
}

fn main() -> Result<()> {
    println!("{:>6} {:>5} {:>8} {:>9} {:>8}", "", "rows", "ms", "GOP/s", "GB/s");
    for (name, kept) in [("f32", Kept::F32), ("int8", Kept::Int8), ("int4", Kept::Int4), ("Q4_1", Kept::Stored)] {
        measure(name, kept)?;
    }
    Ok(())
}

fn measure(name: &str, kept: Kept) -> Result<()> {
    let weight = |outputs: usize, inputs: usize| weight((outputs, inputs), kept);
    // Weights of one input together, as the model asks for them; the last of a layer reads the wide input.
    let layer = || -> Result<[Vec<FrozenWeight>; 4]> {
        Ok([
            vec![weight(HIDDEN, HIDDEN)?, weight(KEYS, HIDDEN)?, weight(KEYS, HIDDEN)?],
            vec![weight(HIDDEN, HIDDEN)?],
            vec![weight(INNER, HIDDEN)?, weight(INNER, HIDDEN)?],
            vec![weight(HIDDEN, INNER)?],
        ])
    };
    let layers = (0..LAYERS).map(|_| layer()).collect::<Result<Vec<_>>>()?;
    let head = [weight(VOCABULARY, HIDDEN)?];
    let numbers =
        (LAYERS * (2 * HIDDEN * HIDDEN + 2 * KEYS * HIDDEN + 3 * INNER * HIDDEN) + VOCABULARY * HIDDEN) as f64;
    for rows in [1, 2, 4, 8, 16, 32, 64, 512] {
        let narrow = Tensor::rand(-1f32, 1.0, (rows, HIDDEN), &Device::Cpu)?;
        let wide = Tensor::rand(-1f32, 1.0, (rows, INNER), &Device::Cpu)?;
        let forward = || -> Result<()> {
            for [attention, output, gated, down] in &layers {
                project(&narrow, attention)?;
                project(&narrow, output)?;
                project(&narrow, gated)?;
                project(&wide, down)?;
            }
            project(&narrow, &head)
        };
        let mut best = f64::INFINITY;
        for _ in 0..7 {
            let clock = Instant::now();
            rayon::scope(|_| forward())?;
            best = best.min(clock.elapsed().as_secs_f64());
        }
        let stored = |weights: &[FrozenWeight]| weights.iter().map(FrozenWeight::bytes).sum::<usize>();
        let bytes = layers.iter().flatten().map(|w| stored(w)).sum::<usize>() + stored(&head);
        let (flops, bytes) = (2.0 * numbers * rows as f64, bytes as f64);
        println!("{name:>6} {rows:>5} {:>8.1} {:>9.0} {:>8.1}", best * 1e3, flops / best / 1e9, bytes / best / 1e9);
    }
    Ok(())
}
