//! Sparse-GIN's layer on one block: what the golden numbers have (see tests/goldens/make_gated.py; those of `reference` were held against the authors'
//! code), in candle's graph and on a tape; its start; and what it refuses.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};
use lorimer_adapter::method::{ModuleTensors, ParameterSource};
use lorimer_adapter::{BlockDelta, BlockSite, Step, methods};
use lorimer_model::{BlockScope, LayerShape, Site};
use lorimer_tensor::{AttentionForm, EdgeKeys, EdgeRule, Edges, Gradients, Ops, Segment, Tape, attention_edges};
use serde_json::{Value, json};

const KEYS: [(&str, &str); 12] = [
    ("in.weight", "in.weight"),
    ("in.bias", "in.bias"),
    ("fc1.weight", "fc1.weight"),
    ("fc1.bias", "fc1.bias"),
    ("fc2.weight", "fc2.weight"),
    ("fc2.bias", "fc2.bias"),
    ("out.weight", "out.weight"),
    ("out.bias", "out.bias"),
    ("norm.weight", "norm"),
    ("act", "act"),
    ("eps", "eps"),
    ("scale", "scale"),
];

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let d = (a - b).unwrap().abs().unwrap().flatten_all().unwrap();
    d.max(0).unwrap().to_scalar::<f64>().unwrap()
}

fn block(layer: usize, layers: usize, hidden: usize) -> BlockSite {
    let shape = LayerShape { heads: 3, kv_heads: 3, head_dim: 4, inner: 8 };
    BlockSite { site: Site::new(&format!("model.layers.{layer}.sparse_gin"), (hidden, hidden)), layer, layers, shape }
}

fn attached(settings: &Value, block: &BlockSite, source: &mut ParameterSource<'_>) -> Box<dyn BlockDelta> {
    let method = methods::build("sparse-gin", settings.as_object().unwrap()).unwrap();
    method.blocks().unwrap().attach(block, source).unwrap().unwrap()
}

/// A case of the goldens: its layer, its tensors, the settings.
fn case(name: &str) -> (Box<dyn BlockDelta>, HashMap<String, Tensor>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens");
    let cases: Value = serde_json::from_slice(&std::fs::read(folder.join("gated.json")).unwrap()).unwrap();
    let case = cases.as_array().unwrap().iter().find(|c| c["name"] == name).unwrap();
    let all = candle_core::safetensors::load(folder.join("gated.safetensors"), &Device::Cpu).unwrap();
    let prefix = format!("{name}.");
    let all: HashMap<String, Tensor> =
        all.into_iter().filter_map(|(k, t)| Some((k.strip_prefix(&prefix)?.to_string(), t))).collect();
    let mut settings = case["settings"].clone();
    let map = settings.as_object_mut().unwrap();
    assert_eq!(map.remove("norm_eps").unwrap(), json!(1e-5));
    let dropout = map.remove("dropout").unwrap();
    map.insert("gin_dropout".into(), dropout);
    let mut module = ModuleTensors::default();
    module.tensors.extend(KEYS.iter().map(|(key, golden)| (key.to_string(), all[*golden].clone())));
    let block = block(0, 1, all["h"].dim(1).unwrap());
    let delta = attached(&settings, &block, &mut ParameterSource::file(&block.site, DType::F64, &mut module));
    assert!(module.tensors.is_empty());
    (delta, all)
}

/// The edges that a rule makes of maps (heads, tokens, tokens), in candle's graph.
fn edges_of(maps: &Tensor, rule: EdgeRule) -> Edges {
    let n = maps.dim(1).unwrap();
    let sums = maps.sum(0).unwrap().minimum(1.0).unwrap();
    let numbers = sums.to_vec2::<f64>().unwrap();
    let (mut offsets, mut columns, mut places) = (vec![0], Vec::new(), Vec::new());
    for (i, row) in numbers.iter().enumerate() {
        for (j, &s) in row.iter().enumerate() {
            if s > rule.above && (rule.keys == EdgeKeys::All && j <= i || i == j) {
                columns.push(j);
                places.push((i * n + j) as u32);
            }
        }
        offsets.push(columns.len());
    }
    let index = Tensor::new(places, &Device::Cpu).unwrap();
    let sums = sums.flatten_all().unwrap().index_select(&index, 0).unwrap();
    Edges { offsets: offsets.into(), columns: columns.into(), sums }
}

#[test]
fn the_layer_is_the_goldens() {
    for name in ["sparse_gin", "sparse_gin_reference"] {
        let (delta, all) = case(name);
        let rule = delta.edges().unwrap();
        let (h, maps) = (Var::from_tensor(&all["h"]).unwrap(), Var::from_tensor(&all["maps"]).unwrap());
        let edges = edges_of(&maps, rule);
        let golden = |key: &str| all[key].to_vec1::<f64>().unwrap().iter().map(|v| *v as usize).collect::<Vec<_>>();
        assert_eq!(edges.offsets[..], golden("edges.offsets"), "{name}");
        assert_eq!(edges.columns[..], golden("edges.columns"), "{name}");
        let mut scope = BlockScope::new(0, true, None);
        scope.edges = Some(edges.clone());
        let y = delta.attended(Ops::plain(), &h, &mut scope, &Step::default()).unwrap();
        assert!(distance(&y, &all["y"]) < 1e-12, "{name}");
        let found = (&y * &all["upstream"]).unwrap().sum_all().unwrap().backward().unwrap();
        let near = |key: &str, t: Option<&Tensor>, golden: &Tensor| {
            let zero = golden.zeros_like().unwrap();
            let d = distance(t.unwrap_or(&zero), golden);
            assert!(d < 1e-10, "{name}: ∂{key} differs by {d:e}");
        };
        near("h", found.get(&h), &all["grad.h"]);
        near("maps", found.get(&maps), &all["grad.maps"]);
        for ((key, var), (own, golden)) in delta.trainable().into_iter().zip(KEYS) {
            assert_eq!(key, own);
            near(key, found.get(var), &all[&format!("grad.{golden}")]);
        }
        // The recorded form.
        let sums = edges.sums.detach();
        let vars = delta.trainable();
        let tape = Tape::new(vars.iter().map(|(_, v)| v.as_tensor()).chain([h.as_tensor(), &sums]));
        let mut scope = BlockScope::new(0, true, None);
        scope.edges = Some(Edges { sums: sums.clone(), ..edges.clone() });
        let y = delta.attended(Ops::recorded(&tape), &h, &mut scope, &Step::default()).unwrap();
        assert!(distance(&y, &all["y"]) < 1e-12, "{name}");
        let mut gradients = Gradients::default();
        tape.backward(&y, all["upstream"].clone(), &mut gradients).unwrap();
        near("h", gradients.get(&h), &all["grad.h"]);
        let of_sums = edges.sums.flatten_all().unwrap();
        let back = (of_sums * gradients.get(&sums).unwrap()).unwrap().sum_all().unwrap().backward().unwrap();
        near("maps", back.get(&maps), &all["grad.maps"]);
        for ((key, var), (_, golden)) in vars.into_iter().zip(KEYS) {
            near(key, gradients.get(var), &all[&format!("grad.{golden}")]);
        }
    }
}

/// The edges are the sums above 0.1405: with nine heads that attend to all keys alike, S = min(1, 9/keys), so rows of up to 64 keys have edges to all
/// of them and longer ones none.
#[test]
fn edges_are_the_sums_above_the_threshold() {
    let block = block(0, 1, 6);
    let stats = Default::default();
    let delta =
        attached(&json!({ "gin_dim": 3 }), &block, &mut ParameterSource::start(&block.site, DType::F32, 0, &stats));
    let rule = delta.edges().unwrap();
    assert!((rule.above - 0.140_546_510_8).abs() < 1e-9);
    let (q, k) = (
        Tensor::zeros((80, 36), DType::F32, &Device::Cpu).unwrap(),
        Tensor::ones((80, 12), DType::F32, &Device::Cpu).unwrap(),
    );
    let edges = attention_edges((&q, &k), &[Segment::plain(0, 80)], &AttentionForm::causal(4, 0.5), rule).unwrap();
    for (row, span) in edges.offsets.windows(2).enumerate() {
        assert_eq!(span[1] - span[0], if row < 64 { row + 1 } else { 0 });
    }
    let sums = edges.sums.to_vec1::<f32>().unwrap();
    assert_eq!(sums[0], 1.0);
    assert!((sums[edges.offsets[20]] - 9.0 / 21.0).abs() < 1e-5);
}

/// Without edges and with ε = 0 the layer reads nothing, so every token gets one constant vector.
#[test]
fn without_edges_every_token_gets_the_same() {
    let (h, maps) = {
        let (_, all) = case("sparse_gin");
        (all["h"].clone(), all["maps"].clone())
    };
    let block = block(1, 2, h.dim(1).unwrap());
    let stats = Default::default();
    for (cut, same) in [(1.0, true), (1.5, true), (0.6, false)] {
        let settings = json!({ "gin_dim": 4, "edge_cut": cut, "start": "uniform" });
        let delta = attached(&settings, &block, &mut ParameterSource::start(&block.site, DType::F64, 3, &stats));
        let mut scope = BlockScope::new(1, true, None);
        scope.edges = Some(edges_of(&maps, delta.edges().unwrap()));
        let y = delta.attended(Ops::plain(), &h, &mut scope, &Step::default()).unwrap();
        let change = (y - &h).unwrap();
        let spread = distance(&change, &change.narrow(0, 0, 1).unwrap().broadcast_as(change.shape()).unwrap());
        assert_eq!(spread < 1e-12, same, "{cut}: {spread}");
        let size = (change.sqr().unwrap().mean_all().unwrap()).to_scalar::<f64>().unwrap().sqrt();
        // λ of the last block, times a normed vector.
        assert!(same || (size - 0.5).abs() < 0.01, "{size}");
    }
}

/// N(0, 0.02²) or ±1/√inputs, another at each seed and block; λ goes from one number to the other over the blocks.
#[test]
fn the_start_is_as_it_says() {
    let stats = Default::default();
    let of = |settings: Value, layer: usize, seed: u64| {
        let block = block(layer, 5, 200);
        let delta = attached(&settings, &block, &mut ParameterSource::start(&block.site, DType::F64, seed, &stats));
        let all = delta.trainable().into_iter();
        all.map(|(key, v)| (key, v.flatten_all().unwrap().to_vec1::<f64>().unwrap())).collect::<HashMap<_, _>>()
    };
    let normal = of(json!({ "gin_dim": 50 }), 1, 0);
    let w = &normal["in.weight"];
    let deviation = (w.iter().map(|v| v * v).sum::<f64>() / w.len() as f64).sqrt();
    assert!((deviation / 0.02 - 1.0).abs() < 0.03 && normal["in.bias"].iter().all(|v| *v == 0.0));
    assert_eq!((normal["scale"][0], normal["eps"][0], normal["act"][0]), (0.125, 0.0, 0.25));
    assert!(normal["norm.weight"].iter().all(|v| *v == 1.0));
    assert_eq!(normal["in.weight"], of(json!({ "gin_dim": 50 }), 1, 0)["in.weight"]);
    for (layer, seed) in [(2, 0), (1, 1)] {
        assert_ne!(normal["in.weight"], of(json!({ "gin_dim": 50 }), layer, seed)["in.weight"]);
    }
    let uniform = of(json!({ "gin_dim": 50, "start": "uniform", "gin_scale": "0.2:-0.2" }), 4, 0);
    let bound = 200f64.powf(-0.5);
    for key in ["in.weight", "in.bias"] {
        let largest = uniform[key].iter().fold(0f64, |top, v| top.max(v.abs()));
        assert!(largest <= bound && largest > 0.9 * bound, "{key}");
    }
    assert_eq!(uniform["scale"][0], -0.2);
}

#[test]
fn settings_that_cannot_be_are_refused_by_name() {
    for (settings, says) in [
        (json!({ "gin_dim": 0 }), "gin_dim"),
        (json!({ "gin_dropout": 1.0 }), "gin_dropout"),
        (json!({ "edge_sharpness": 0 }), "edge_sharpness"),
        (json!({ "edge_cut": 0 }), "edge_cut"),
        (json!({ "edge_threshold": -0.1 }), "edge_threshold"),
        (json!({ "edge_cut": 0.1 }), "at least 0.01"),
        (json!({ "gin_scale": "0.5" }), "gin_scale"),
        (json!({ "gin_scale": [1] }), "gin_scale"),
        (json!({ "gin_scale": [0, 1e9] }), "gin_scale"),
        (json!({ "direction": "both" }), "`both`"),
        (json!({ "target_modules": ["q_proj"] }), "layers_to_transform"),
        (json!({ "adj_construction_method": "mean" }), "adj_construction_method"),
        (json!({ "gnn_mode": "per_head" }), "gnn_mode"),
        (json!({ "gnn_logic": "after_MLP" }), "gnn_logic"),
        (json!({ "num_layers": 3 }), "num_layers"),
        (json!({ "r": 8 }), "`r`"),
    ] {
        let problem = methods::build("sparse-gin", settings.as_object().unwrap()).err().expect("refused").to_string();
        assert!(problem.contains(says) && !problem.contains('\n'), "{settings}: {problem}");
    }
}
