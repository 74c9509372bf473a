//! `lorimer quantize` into GPTQ's and AWQ's formats.

use std::path::Path;

use lorimer::model::LoadDtype;
use lorimer::model::base::open_weights;
use serde_json::{Value, json};

use crate::common::{Fixture, error, goldens, json as run_json, ok, text};

fn config(folder: &str) -> Value {
    serde_json::from_slice(&std::fs::read(Path::new(folder).join("config.json")).unwrap()).unwrap()
}

/// What is written is a base: packed as `config.json` says, with the numbers that it has expanded, and one that trains and serves.
#[test]
fn gptq_and_awq_checkpoints_are_written() {
    let f = Fixture::new();
    let rows = ["--calibration", f.data.as_str()];
    let cases: [(&str, &[&str], Value); 5] = [
        ("rtn-gptq", &["--method", "rtn"], json!({ "quant_method": "gptq", "sym": true, "checkpoint_format": "gptq" })),
        (
            "rtn-asym",
            &["--method", "rtn", "--asym"],
            json!({ "quant_method": "gptq", "sym": false, "checkpoint_format": "gptq_v2" }),
        ),
        (
            "rtn-awq",
            &["--method", "rtn", "--format", "awq"],
            json!({ "quant_method": "awq", "zero_point": true, "version": "gemm", "modules_to_not_convert": null }),
        ),
        (
            "gptq",
            &["--method", "gptq", rows[0], rows[1]],
            json!({ "quant_method": "gptq", "sym": true, "checkpoint_format": "gptq", "desc_act": false, "damp_percent": 0.01 }),
        ),
        (
            "gptq-awq",
            &["--method", "gptq", "--format", "awq", rows[0], rows[1], "--samples", "9"],
            json!({ "quant_method": "awq", "zero_point": true, "version": "gemm" }),
        ),
    ];
    for (name, more, expected) in cases {
        let (out, dense) = (f.path(name), f.path(&format!("{name}.dense")));
        let all = ["quantize", "--model", &f.model, "--group-size", "16", "--output", &out, "--export-dense", &dense];
        let report = run_json(&[&all[..], more].concat());
        let method = more[1];
        assert_eq!((&report["settings"]["method"], &report["pairs"]), (&json!(method), &Value::Null));
        let written = &config(&out)["quantization_config"];
        for (key, value) in expected.as_object().unwrap() {
            assert_eq!(&written[key], value, "{name}: {key}");
        }
        assert_eq!((&written["bits"], &written["group_size"]), (&json!(4), &json!(16)));
        // The format's name is not the method's.
        assert_eq!(written["meta"]["rounding"], method);
        let (_, weights) = open_weights(Path::new(&out), LoadDtype::F32).unwrap();
        let (_, whole) = open_weights(Path::new(&dense), LoadDtype::F32).unwrap();
        let mut bytes = 0;
        for m in report["modules"].as_array().unwrap() {
            let path = m["module"].as_str().unwrap();
            let shape = (m["shape"][0].as_u64().unwrap() as usize, m["shape"][1].as_u64().unwrap() as usize);
            let [packed, expanded] = [&weights, &whole].map(|weights| {
                let weight = weights.weight(&format!("{path}.weight"), shape).unwrap();
                weight.dense(candle_core::DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
            });
            assert_eq!(packed, expanded, "{name}: {path}");
            let parts =
                ["qweight", "qzeros", "scales", "g_idx"].map(|part| weights.raw(&format!("{path}.{part}")).unwrap());
            let own: usize = parts.iter().flatten().map(|raw| raw.2.len()).sum();
            assert_eq!(own as u64, m["bytes"].as_u64().unwrap());
            bytes += own as u64;
            let (error, plain) = (m["error"].as_f64().unwrap(), m["plain"].as_f64().unwrap());
            let least = if method == "gptq" { error < plain } else { error == plain };
            assert!(least && error > 0.0 && error < 0.2, "{name}: {m}");
        }
        assert_eq!(bytes, report["bytes"].as_u64().unwrap());
        let loss = |model: &str, more: &[&str]| {
            run_json(&[&["eval", "--model", model, "--data", &f.data], more].concat())["loss"].as_f64().unwrap()
        };
        let packed = loss(&out, &[]);
        assert!((packed - loss(&dense, &[])).abs() < 1e-5, "{name}");
        assert!((packed - loss(&f.model, &[])).abs() < 0.2, "{name}");
        let tuned = f.path(&format!("{name}.adapter"));
        let train =
            ["train", "--model", &out, "--data", &f.data, "--output", &tuned, "--lr", "1e-2", "--max-steps", "15"];
        ok(&train);
        assert!(loss(&out, &["--adapter", &tuned]) < packed - 0.05, "{name}");
    }
    // Whole rows.
    let rows = f.path("whole-rows");
    let all = ["quantize", "--model", &f.model, "--method", "rtn", "--group-size", "-1", "--output", &rows];
    let report = run_json(&all);
    assert_eq!(
        (&config(&rows)["quantization_config"]["group_size"], report["modules"][0]["group_size"].as_u64()),
        (&json!(-1), Some(32))
    );
    let told = error(&["quantize", "--model", &rows, "--method", "rtn", "--output", &f.path("twice")]);
    assert!(told.contains("is packed already"), "{told}");
}

/// A sentence, and nothing written.
#[test]
fn what_does_not_go_with_groups_is_refused() {
    let f = Fixture::new();
    let out = f.path("out");
    let empty = f.path("empty.jsonl");
    std::fs::write(&empty, "").unwrap();
    let before = std::fs::read_dir(f.folder.path()).unwrap().count();
    let data = f.data.as_str();
    for (more, word) in [
        (
            &["--method", "rtn"][..],
            "groups of 128 do not divide the 32 inputs of `model.layers.0.self_attn.q_proj`; pass --group-size 16, 8, or -1",
        ),
        (&["--method", "rtn", "--group-size", "0"], "multiple of 8"),
        (&["--method", "rtn", "--group-size", "-2"], "multiple of 8"),
        (&["--method", "rtn", "--group-size", "12"], "multiple of 8"),
        (&["--method", "rtn", "--group-size", "9223372036854775800"], "do not divide"),
        (&["--method", "rtn", "--group-size", "16", "--bits", "3"], "should be 4"),
        (&["--method", "rtn", "--group-size", "16", "--rank", "2"], "leave --rank out"),
        (&["--method", "rtn", "--group-size", "16", "--format", "lorimer-nf"], "does not go with `--method rtn`"),
        (&["--method", "nf", "--bits", "4", "--format", "awq"], "does not go with `--method nf`"),
        (&["--method", "nf", "--bits", "4", "--group-size", "16"], "--group-size"),
        (&["--method", "nf", "--bits", "4", "--asym"], "--asym"),
        (&["--method", "nf", "--bits", "4", "--alpha", "8"], "--alpha"),
        (&["--method", "rtn", "--group-size", "16", "--seed", "1"], "--seed"),
        (&["--method", "gptq", "--group-size", "16", "--calibration", data, "--steps", "5"], "--steps"),
        (&["--method", "rtn", "--group-size", "16", "--calibration", data], "--method gptq"),
        (&["--method", "nf", "--bits", "4", "--calibration", data], "--method gptq"),
        (&["--method", "rtn", "--group-size", "16", "--fisher", data], "leave it out"),
        (&["--method", "gptq", "--group-size", "16"], "pass --calibration"),
        (&["--method", "gptq", "--group-size", "16", "--calibration", "nowhere.jsonl"], "nowhere.jsonl"),
        (&["--method", "gptq", "--group-size", "16", "--calibration", empty.as_str()], "empty.jsonl"),
        (&["--method", "gptq", "--group-size", "16", "--calibration", data, "--fisher", data], "leave it out"),
    ] {
        let told = error(&[&["quantize", "--model", f.model.as_str(), "--output", &out][..], more].concat());
        assert!(told.contains(word), "{more:?}: {told}");
        assert_eq!(std::fs::read_dir(f.folder.path()).unwrap().count(), before, "{more:?}");
    }
    // Weights that no grid holds.
    let wild = f.path("wild");
    std::fs::create_dir(&wild).unwrap();
    let files = ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];
    for file in files {
        std::fs::copy(goldens("tiny-llama").join(file), Path::new(&wild).join(file)).unwrap();
    }
    let file = lorimer::model::weights::SafetensorsFile::open(&goldens("tiny-llama/model.safetensors")).unwrap();
    let mut tensors: std::collections::BTreeMap<String, candle_core::Tensor> =
        file.names().into_iter().map(|name| (name.clone(), file.load(&name).unwrap().unwrap())).collect();
    let name = "model.layers.1.mlp.down_proj.weight";
    tensors.insert(name.into(), (&tensors[name] * f64::INFINITY).unwrap());
    let bytes = lorimer::adapter::file::bytes::safetensors_bytes(&tensors).unwrap();
    std::fs::write(Path::new(&wild).join("model.safetensors"), bytes).unwrap();
    let told = error(&["quantize", "--model", &wild, "--method", "rtn", "--group-size", "16", "--output", &out]);
    assert!(told.contains("model.layers.1.mlp.down_proj") && !Path::new(&out).exists(), "{told}");
}

/// A readable end for people: method and groups are named.
#[test]
fn the_report_names_method_and_groups() {
    let f = Fixture::new();
    let out = f.path("out");
    let told = ok(&[
        "quantize",
        "--model",
        &f.model,
        "--method",
        "gptq",
        "--calibration",
        &f.data,
        "--group-size",
        "16",
        "--output",
        &out,
    ]);
    assert!(told.contains("groups of 16") && told.contains("of outputs on the rows"), "{told}");
    assert!(!told.contains("pairs of matrix"), "{}", text(told.as_bytes()));
}
