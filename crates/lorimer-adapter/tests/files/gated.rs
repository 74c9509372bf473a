//! FlyLoRA and SMoRA on one projection: what their authors' code computes (see tests/goldens/make_gated.py), the recorded form, the served form, and
//! the rules by which buffers move.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};
use lorimer_adapter::method::{ModuleTensors, ParameterSource};
use lorimer_adapter::{Adapter, Attached, Delta, Step, methods};
use lorimer_model::{Adaptation, Projection, Site};
use lorimer_tensor::{FrozenWeight, Gradients, Tape};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

fn goldens() -> (Vec<Value>, HashMap<String, Tensor>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens");
    let cases: Value = serde_json::from_slice(&std::fs::read(folder.join("gated.json")).unwrap()).unwrap();
    let cases = cases.as_array().unwrap().iter().filter(|c| c["method"] == "smora" || c["method"] == "flylora");
    let cases = cases.filter(|c| c.get("rows").is_none()).cloned().collect();
    (cases, candle_core::safetensors::load(folder.join("gated.safetensors"), &Device::Cpu).unwrap())
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let of = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
    let d = (of(a) - of(b)).unwrap().abs().unwrap().flatten_all().unwrap();
    d.max(0).unwrap().to_scalar::<f64>().unwrap()
}

/// One case of the goldens: a projection with W = 0 and the adapter that the case describes.
struct Case {
    name: String,
    base: Projection,
    delta: Box<dyn Delta>,
    all: HashMap<String, Tensor>,
}

impl Case {
    fn open(case: &Value, all: &HashMap<String, Tensor>, dtype: DType) -> Self {
        let name = case["name"].as_str().unwrap().to_string();
        let of = |key: &str| all.get(&format!("{name}.{key}")).cloned();
        let all: HashMap<String, Tensor> = all
            .iter()
            .filter_map(|(key, t)| Some((key.strip_prefix(&format!("{name}."))?.to_string(), t.clone())))
            .collect();
        let (outputs, inputs) = (of("lora_B").unwrap().dim(0).unwrap(), of("x").unwrap().dim(1).unwrap());
        let site = Site::new("model.layers.0.mlp.down_proj", (outputs, inputs));
        let weight = Tensor::zeros((outputs, inputs), dtype, &Device::Cpu).unwrap();
        let base = Projection { weight: FrozenWeight::Dense(weight), bias: None };
        let mut module = ModuleTensors::default();
        for key in ["lora_A", "lora_B", "lora_router"] {
            module.tensors.extend(of(key).map(|t| (format!("{key}.weight"), t)));
        }
        for key in ["lora_topk_bias", "lora_biases"] {
            module.tensors.extend(of(key).map(|t| (key.to_string(), t)));
        }
        let method = methods::build(case["method"].as_str().unwrap(), case["settings"].as_object().unwrap()).unwrap();
        let delta = method.attach(&site, &base, &mut ParameterSource::file(&site, dtype, &mut module)).unwrap();
        assert!(module.tensors.is_empty(), "{name}: {:?} are left", module.tensors.keys());
        Self { name, base, delta, all }
    }

    fn near(&self, what: &str, found: &Tensor, golden: &str, bound: f64) {
        let golden = self.all.get(golden).unwrap_or_else(|| panic!("{}: golden `{golden}`", self.name));
        let (d, size) = (distance(found, golden), distance(golden, &golden.zeros_like().unwrap()));
        assert!(d < bound * (1.0 + size), "{}: {what} differs by {d:e}", self.name);
    }
}

/// Output, gradients, and where the bias stands after a step, in candle's own graph.
#[test]
fn the_plain_form_is_the_authors() {
    let (cases, all) = goldens();
    assert!(cases.len() >= 15);
    for case in &cases {
        let case = Case::open(case, &all, DType::F64);
        let x = Var::from_tensor(&case.all["x"]).unwrap();
        let zero = case.all["delta"].zeros_like().unwrap();
        let step = Step::training(7);
        let y = case.delta.forward(&case.base, x.as_tensor(), &zero, &step).unwrap();
        case.near("the output", &y, "delta", 1e-9);
        let found = (&y * &case.all["upstream"]).unwrap().sum_all().unwrap().backward().unwrap();
        for (key, var) in case.delta.trainable() {
            let zero = var.zeros_like().unwrap();
            case.near(&format!("∂{key}"), found.get(var.as_tensor()).unwrap_or(&zero), &format!("grad.{key}"), 1e-9);
        }
        let zero = x.zeros_like().unwrap();
        case.near("∂x", found.get(x.as_tensor()).unwrap_or(&zero), "grad.x", 1e-9);
        // The same forward again, as where layers are computed twice, counts nothing twice; and evaluation counts nothing.
        case.delta.forward(&case.base, x.as_tensor(), &case.all["delta"], &step).unwrap();
        case.delta.forward(&case.base, x.as_tensor(), &case.all["delta"], &Step::default()).unwrap();
        case.delta.after_step().unwrap();
        let (key, bias) = case.delta.buffers()[0];
        if case.all["lora_B"].dim(1).unwrap() > 0 && y.dims() == case.all["delta"].dims() {
            case.near("the bias", bias.as_tensor(), &format!("after.{key}"), 1e-12);
        }
        // Nothing was noted since.
        let before = bias.as_tensor().copy().unwrap();
        case.delta.after_step().unwrap();
        assert_eq!(distance(&before, bias.as_tensor()), 0.0);
    }
}

/// What is served, row by row in f32, gives the same gates as the form that trains.
#[test]
fn served_gates_are_those_that_train() {
    let (cases, all) = goldens();
    for case in &cases {
        let case = Case::open(case, &all, DType::F32);
        let Some(gate) = case.delta.rank_gate().unwrap() else { panic!("{}: no gate", case.name) };
        let x = case.all["x"].to_dtype(DType::F32).unwrap();
        let u = x.matmul(&case.all["lora_A"].to_dtype(DType::F32).unwrap().t().unwrap()).unwrap();
        let expected = (&u * case.delta.gates(&x, &u, &Step::default()).unwrap()).unwrap();
        let mut numbers = u.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let inputs = x.dim(1).unwrap();
        gate.apply(0, &x.flatten_all().unwrap().to_vec1::<f32>().unwrap(), inputs, &mut numbers);
        let found = Tensor::from_vec(numbers.clone(), u.shape(), &Device::Cpu).unwrap();
        assert!(distance(&found, &expected) < 1e-5, "{}", case.name);
        // A row alone gives the same bits.
        let (row, rank) = (x.narrow(0, 3, 1).unwrap(), u.dim(1).unwrap());
        let mut alone = u.narrow(0, 3, 1).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        gate.apply(0, &row.flatten_all().unwrap().to_vec1::<f32>().unwrap(), inputs, &mut alone);
        assert_eq!(alone, numbers[3 * rank..4 * rank], "{}", case.name);
    }
}

/// A model of one projection, for an adapter as a whole.
mod one {
    use super::*;
    use candle_core::Result;
    use lorimer_model::{BaseModel, Input, KvCache, Layout, ModelShape};
    use lorimer_tensor::Segment;

    pub struct One {
        pub site: Site,
        pub base: Projection,
        pub shape: ModelShape,
    }

    impl BaseModel for One {
        fn shape(&self) -> &ModelShape {
            &self.shape
        }
        fn projections(&self) -> Vec<(&Site, &Projection)> {
            vec![(&self.site, &self.base)]
        }
        fn parameter(&self, _: &str) -> Result<Option<Tensor>> {
            Ok(None)
        }
        fn parameter_names(&self) -> Vec<String> {
            Vec::new()
        }
        fn stem_parameters(&self) -> Vec<String> {
            Vec::new()
        }
        fn dtype(&self) -> DType {
            DType::F64
        }
        fn bytes(&self) -> usize {
            self.base.weight.bytes()
        }
        fn stem(&self, input: Input<'_>, _: &[usize], _: &dyn Adaptation) -> Result<Tensor> {
            match input {
                Input::Embeddings(rows) => Ok(rows.clone()),
                Input::Tokens(_) => candle_core::bail!("this model has no tokens"),
            }
        }
        fn layout(&self, _: &[usize], segments: &[Segment], _: Option<&[u32]>) -> Layout {
            Layout { segments: segments.to_vec(), rotary: Vec::new(), last: None }
        }
        fn block(
            &self,
            _: usize,
            h: &Tensor,
            _: &Layout,
            on: &dyn Adaptation,
            _: Option<&mut KvCache>,
        ) -> Result<Tensor> {
            on.project(&self.site, &self.base, h)
        }
        fn end(&self, h: &Tensor, _: &dyn Adaptation) -> Result<Tensor> {
            Ok(h.clone())
        }
    }
}

fn random(shape: (usize, usize), seed: u64) -> Tensor {
    let numbers = (0..shape.0 * shape.1).map(|i| ((i as f64 + 1.0) * 0.754_877 + seed as f64 * 0.569_84).sin() * 1.3);
    Tensor::from_vec(numbers.collect::<Vec<f64>>(), shape, &Device::Cpu).unwrap()
}

fn model(inputs: usize, outputs: usize) -> one::One {
    let weight = FrozenWeight::Dense(random((outputs, inputs), 5));
    one::One {
        site: Site::new("model.layers.0.mlp.up_proj", (outputs, inputs)),
        base: Projection { weight, bias: None },
        shape: lorimer_model::ModelShape {
            model_type: "one".into(),
            vocabulary: 0,
            hidden: inputs,
            max_positions: 64,
            layers: Vec::new(),
            causal: true,
            rotary_border: None,
        },
    }
}

fn attached(method: &str, settings: Value, model: &one::One) -> Adapter {
    let settings = settings.as_object().unwrap();
    let adapter = Adapter::attach(model, methods::build(method, settings).unwrap(), 3).unwrap();
    for (i, (_, var)) in adapter.trainable().into_iter().enumerate() {
        let dims = var.dims2().unwrap();
        var.set(&random(dims, 20 + i as u64)).unwrap();
    }
    adapter
}

/// The form that trains, recorded on a tape, gives the numbers and the gradients of candle's graph.
#[test]
fn the_recorded_form_equals_the_plain_one() {
    for (method, settings) in [
        ("flylora", json!({ "r": 6, "top_k": 2 })),
        ("flylora", json!({ "r": 6, "top_k": 2, "input_gradient": "cut", "select": "magnitude" })),
        ("flylora", json!({ "r": 4, "top_k": 4 })),
        ("smora", json!({ "r": 6, "activate_r": 2 })),
        ("smora", json!({ "r": 8, "activate_r": 4, "rank_partition": 2, "gate": "unbiased" })),
        ("smora", json!({ "r": 6, "activate_r": 2, "train_router": false })),
    ] {
        let model = model(12, 10);
        let adapter = attached(method, settings.clone(), &model);
        let x = Var::from_tensor(&random((9, 12), 1)).unwrap();
        let upstream = random((9, 10), 2);
        let on = Attached::one(&adapter).at(Step::training(4));
        let plain = on.project(&model.site, &model.base, x.as_tensor()).unwrap();
        let found = (&plain * &upstream).unwrap().sum_all().unwrap().backward().unwrap();
        let parameters = adapter.trainable();
        let followed = parameters.iter().map(|(_, var)| var.as_tensor()).chain([x.as_tensor()]);
        let tape = Tape::new(followed);
        let on = on.recorded(&tape);
        let y = on.project(&model.site, &model.base, x.as_tensor()).unwrap();
        assert!(distance(&y, &plain) < 1e-12, "{method} {settings}");
        let mut gradients = Gradients::default();
        tape.backward(&y, upstream, &mut gradients).unwrap();
        for (name, var) in parameters.iter().map(|(name, var)| (name.as_str(), *var)).chain([("x", &x)]) {
            let zero = var.zeros_like().unwrap();
            let (a, b) = (gradients.get(var.as_tensor()), found.get(var.as_tensor()));
            assert!(distance(a.unwrap_or(&zero), b.unwrap_or(&zero)) < 1e-11, "{method} {settings}: ∂{name}");
        }
    }
}

/// A of FlyLoRA: so many non-zeros a row, of the deviation that the paper says, another at each seed and site, and not trained.
#[test]
fn flyloras_projection_is_sparse_and_frozen() {
    let model = model(600, 8);
    let settings = json!({ "r": 32, "top_k": 8 });
    let a = |seed: u64| {
        let method = methods::build("flylora", settings.as_object().unwrap()).unwrap();
        let adapter = Adapter::attach(&model, method, seed).unwrap();
        assert!(adapter.trainable().iter().all(|(name, _)| name.ends_with("lora_B")));
        let stored = adapter.to_stored("base").unwrap();
        let name = format!("base_model.model.{}.lora_A.weight", model.site.path);
        stored.tensors[&name].to_vec2::<f64>().unwrap()
    };
    let rows = a(1);
    let values: Vec<f64> = rows.iter().flatten().copied().filter(|v| *v != 0.0).collect();
    assert!(rows.iter().all(|row| row.iter().filter(|v| **v != 0.0).count() == 150));
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let deviation = (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64).sqrt();
    assert!((deviation * 32.0 - 1.0).abs() < 0.05 && mean.abs() < 4.0 / (32.0 * (values.len() as f64).sqrt()));
    assert_eq!(rows, a(1));
    let other = a(2);
    let norm = |row: &[f64]| row.iter().map(|v| v * v).sum::<f64>().sqrt();
    let cosine = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>() / (norm(a) * norm(b));
    let squares: f64 = rows.iter().flat_map(|a| other.iter().map(|b| cosine(a, b).powi(2))).sum();
    let rms = (squares / (32.0 * 32.0)).sqrt();
    assert!((rms * 600f64.sqrt() - 1.0).abs() < 0.1, "{rms}");
}

/// With every rank acting, FlyLoRA is a LoRA whose A is frozen, and only then it has a weight; SMoRA never has one.
#[test]
fn what_can_be_merged_says_so() {
    let model = model(12, 10);
    let merged = |method: &str, settings: Value| {
        let adapter = attached(method, settings, &model);
        adapter.sites(&model)[0].2.merged(&model.base).unwrap()
    };
    assert!(merged("flylora", json!({ "r": 4, "top_k": 4 })).is_ok());
    assert!(merged("flylora", json!({ "r": 4, "top_k": 2 })).is_err());
    assert!(merged("smora", json!({ "r": 4, "activate_r": 4 })).is_err());
    // What says so differs from every fixed weight: it is no linear function of its input.
    for (method, settings) in
        [("flylora", json!({ "r": 4, "top_k": 2 })), ("smora", json!({ "r": 4, "activate_r": 4 }))]
    {
        let adapter = attached(method, settings, &model);
        let on = Attached::one(&adapter);
        let of = |x: &Tensor| on.project(&model.site, &model.base, x).unwrap();
        let (a, b) = (random((5, 12), 1), random((5, 12), 9));
        let sum = (of(&a) + of(&b)).unwrap();
        assert!(distance(&of(&(&a + &b).unwrap()), &sum) > 1e-3, "{method} is linear");
    }
}

/// With every rank acting FlyLoRA gives what a LoRA of the same factors gives, with the same gradient of B, and the same merged weight.
#[test]
fn flylora_with_every_rank_is_lora() {
    let model = model(12, 10);
    let fly = attached("flylora", json!({ "r": 4, "top_k": 4, "lora_alpha": 6 }), &model);
    let lora = attached("lora", json!({ "r": 4, "lora_alpha": 6, "target_modules": ["up_proj"] }), &model);
    let stored = fly.to_stored("base").unwrap();
    for (name, var) in lora.trainable() {
        var.set(&stored.tensors[&format!("base_model.model.{name}.weight")].to_dtype(DType::F64).unwrap()).unwrap();
    }
    // d orders ranks, and all of them act.
    fly.sites(&model)[0].2.buffers()[0].1.set(&random((1, 4), 8).squeeze(0).unwrap()).unwrap();
    let (x, upstream) = (random((9, 12), 1), random((9, 10), 2));
    for step in [Step::default(), Step::training(4)] {
        let of = |adapter: &Adapter| {
            let y = Attached::one(adapter).at(step).project(&model.site, &model.base, &x).unwrap();
            let found = (&y * &upstream).unwrap().sum_all().unwrap().backward().unwrap();
            let b = adapter.trainable().into_iter().find(|(name, _)| name.ends_with("lora_B")).unwrap().1;
            (y, found.get(b.as_tensor()).unwrap().clone())
        };
        let ((y, b), (expected, of_b)) = (of(&fly), of(&lora));
        assert!(distance(&y, &expected) < 1e-12 && distance(&b, &of_b) < 1e-12);
    }
    let merged = |adapter: &Adapter| adapter.sites(&model)[0].2.merged(&model.base).unwrap().unwrap();
    let (ours, loras) = (merged(&fly), merged(&lora));
    assert!(distance(&ours, &loras) < 1e-12);
    let unmerged = Attached::one(&fly).project(&model.site, &model.base, &x).unwrap();
    assert!(distance(&x.matmul(&ours.t().unwrap()).unwrap(), &unmerged) < 1e-12);
}

/// Counts are those of all rows of a step, however it is split into forwards, and d moves alike. To be seen to fail: counts of the last forward.
#[test]
fn counts_do_not_depend_on_how_a_batch_is_split() {
    for (method, settings) in [
        ("flylora", json!({ "r": 8, "top_k": 3, "bias_u": 0.01 })),
        ("smora", json!({ "r": 8, "activate_r": 3, "bias_update_rate": 0.01 })),
    ] {
        let model = model(12, 10);
        let x = random((48, 12), 1);
        let moved = |parts: &[usize]| {
            let adapter = attached(method, settings.clone(), &model);
            let (mut first, delta) = (0, adapter.sites(&model)[0].2);
            for (number, rows) in parts.iter().enumerate() {
                let part = x.narrow(0, first, *rows).unwrap().contiguous().unwrap();
                let on = Attached::one(&adapter).at(Step::training(100 + number as u64));
                on.project(&model.site, &model.base, &part).unwrap();
                first += rows;
            }
            assert_eq!(first, 48);
            delta.after_step().unwrap();
            delta.buffers()[0].1.to_vec1::<f64>().unwrap()
        };
        let whole = moved(&[48]);
        assert!(whole.iter().any(|d| *d > 0.0) && whole.iter().any(|d| *d < 0.0), "{method}: {whole:?}");
        for parts in [&[24, 24][..], &[1, 40, 7], &[1; 48]] {
            assert_eq!(moved(parts), whole, "{method} {parts:?}");
        }
    }
}

/// d chooses ranks and does nothing else: another d that chooses the same gives the same output.
#[test]
fn d_counts_in_the_choice_only() {
    let model = model(12, 10);
    let adapter = attached("flylora", json!({ "r": 6, "top_k": 2 }), &model);
    let x = random((9, 12), 1);
    let delta = adapter.sites(&model)[0].2;
    let with = |d: [f64; 6]| {
        delta.buffers()[0].1.set(&Tensor::new(&d, &Device::Cpu).unwrap()).unwrap();
        Attached::one(&adapter).project(&model.site, &model.base, &x).unwrap()
    };
    // Two ranks far above the others, whatever the token; then otherwise, and in another order.
    let fixed = with([0.0, 1e3, 0.0, 0.0, 1e3, 0.0]);
    assert_eq!(distance(&fixed, &with([-7.0, 3e3, 2.0, -1.0, 2e3, 5.0])), 0.0);
    assert_eq!(distance(&fixed, &with([9.0, 1e3, 9.0, 9.0, 4e3, 9.0])), 0.0);
    assert!(distance(&fixed, &with([1e3, 0.0, 0.0, 0.0, 1e3, 0.0])) > 1e-3);
    // All scores moved alike choose as before.
    assert_eq!(distance(&with([0.0; 6]), &with([0.5; 6])), 0.0);
}

/// SMoRA's gates: none negative, exactly k a token above zero, and k together; in each block of ranks so many as it may choose.
#[test]
fn smoras_gates_sum_to_k() {
    for (r, k, partition) in [(8, 3, 1), (6, 6, 1), (12, 1, 1), (16, 8, 4)] {
        for gate in ["code", "unbiased"] {
            let model = model(12, 10);
            let settings = json!({ "r": r, "activate_r": k, "rank_partition": partition, "gate": gate });
            let adapter = attached("smora", settings, &model);
            let delta = adapter.sites(&model)[0].2;
            let bias = delta.buffers()[0].1;
            bias.set(&(random((1, r), 4).reshape(bias.dims()).unwrap() * 0.05).unwrap()).unwrap();
            let x = random((40, 12), 6);
            let a = adapter.trainable().into_iter().find(|(name, _)| name.ends_with("lora_A")).unwrap().1;
            let u = x.matmul(&a.t().unwrap()).unwrap();
            for row in delta.gates(&x, &u, &Step::default()).unwrap().to_vec2::<f64>().unwrap() {
                let sum: f64 = row.iter().sum();
                assert!((sum - k as f64).abs() < 1e-5 * k as f64, "{gate} {k} of {r}: {row:?}");
                assert!(row.iter().all(|g| *g >= 0.0), "{gate} {k} of {r}: {row:?}");
                assert_eq!(row.iter().filter(|g| **g != 0.0).count(), k, "{gate} {k} of {r}: {row:?}");
            }
        }
    }
}

/// Use of the ranks evens out where the bias moves, on inputs that favour some.
#[test]
fn the_bias_evens_out_the_use_of_ranks() {
    for (method, key, rate, settings) in [
        ("flylora", "bias_u", 5e-3, json!({ "r": 16, "top_k": 4 })),
        ("smora", "bias_update_rate", 1e-3, json!({ "r": 16, "activate_r": 4 })),
    ] {
        let spread = |rate: f64| {
            let model = model(24, 10);
            let mut settings = settings.clone();
            settings[key] = rate.into();
            let adapter = attached(method, settings, &model);
            let delta = adapter.sites(&model)[0].2;
            let mut counts = [0f64; 16];
            for step in 0..600u64 {
                // One direction stands out.
                let mut rng = ChaCha8Rng::seed_from_u64(step);
                let mut x: Vec<Vec<f64>> =
                    (0..64).map(|_| (0..24).map(|_| rng.random_range(-1.5..1.5)).collect()).collect();
                x.iter_mut().for_each(|row| row[3] = row[3] * 2.0 + 2.0);
                let x = Tensor::new(x, &Device::Cpu).unwrap();
                let forms = delta.change(&model.base, 64, &Step::default()).unwrap();
                let lorimer_adapter::Change::Gated(gated) = forms else { panic!("{method} has no gates") };
                let u = x.matmul(&gated.factors.a.t().unwrap()).unwrap();
                let gates = delta.gates(&x, &u, &Step::training(step)).unwrap().to_vec2::<f64>().unwrap();
                delta.after_step().unwrap();
                if step >= 500 {
                    for row in gates {
                        counts.iter_mut().zip(row).for_each(|(count, g)| *count += f64::from(u8::from(g > 0.0)));
                    }
                }
            }
            let mean = counts.iter().sum::<f64>() / 16.0;
            counts.iter().map(|c| (c - mean).powi(2)).sum::<f64>()
        };
        let (with, without) = (spread(rate), spread(0.0));
        assert!(with < 0.3 * without, "{method}: {with} with, {without} without");
    }
}

/// A score far below or above zero, as a large input gives, has gradients that are numbers.
#[test]
fn large_scores_have_gradients() {
    let (cases, all) = goldens();
    let case =
        cases.iter().find(|case| case["method"] == "smora" && case["settings"]["train_router"] != false).unwrap();
    let case = Case::open(case, &all, DType::F32);
    let x = (case.all["x"].to_dtype(DType::F32).unwrap() * 1e4).unwrap();
    let y = case.base.forward(&x).unwrap();
    let change = case.delta.forward(&case.base, &x, &y, &Step::default()).unwrap();
    let gradients = change.sum_all().unwrap().backward().unwrap();
    for (key, var) in case.delta.trainable() {
        let sum = gradients.get(var.as_tensor()).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(sum.is_finite(), "{key}");
    }
}

/// Evaluation counts nothing: after it, a step moves no bias.
#[test]
fn evaluation_moves_no_bias() {
    let (cases, all) = goldens();
    for case in &cases {
        let case = Case::open(case, &all, DType::F64);
        let bias = || case.delta.buffers()[0].1.as_tensor().copy().unwrap();
        let (x, before) = (&case.all["x"], bias());
        let y = case.base.forward(x).unwrap();
        case.delta.forward(&case.base, x, &y, &Step::default()).unwrap();
        case.delta.after_step().unwrap();
        assert_eq!(distance(&bias(), &before), 0.0, "{}", case.name);
    }
}
