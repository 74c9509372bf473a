//! The functions of the fuzz targets with thousands of damaged inputs: seeds with bytes changed, cut, doubled and put together, always the same.

#[path = "../../../fuzz/checks.rs"]
mod checks;
#[path = "program/common/mod.rs"]
mod common;

use candle_core::quantized::gguf_file::{Content, Value as Meta, write};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

/// Most memory that all of it may take.
const MAX_MEMORY: u64 = 3 << 30;

/// One damage.
fn damage(bytes: &mut Vec<u8>, seeds: &[Vec<u8>], words: &[&str], rng: &mut ChaCha8Rng) {
    let at = rng.random_range(0..=bytes.len());
    match rng.random_range(0..8) {
        0 => bytes.truncate(at),
        1 => (0..rng.random_range(1..6)).for_each(|_| {
            if let Some(byte) = bytes.get_mut(rng.random_range(0..=at)) {
                *byte = rng.random();
            }
        }),
        // A number in eight bytes of another size, as lengths are.
        2 if bytes.len() >= 8 => {
            let at = rng.random_range(0..=bytes.len() - 8);
            bytes[at..at + 8].copy_from_slice(&(rng.random::<u64>() >> rng.random_range(0..64)).to_le_bytes());
        }
        3 => {
            let part = bytes[rng.random_range(0..=at)..at].to_vec();
            bytes.splice(at..at, part);
        }
        4 => {
            let other = &seeds[rng.random_range(0..seeds.len())];
            let from = rng.random_range(0..=other.len());
            bytes.splice(at.., other[from..].iter().copied());
        }
        // A value of text by another.
        _ if !words.is_empty() => {
            let marks: Vec<usize> =
                bytes.iter().enumerate().filter(|(_, b)| b":[, {(|".contains(b)).map(|(i, _)| i + 1).collect();
            let word = words[rng.random_range(0..words.len())].bytes();
            match marks.get(rng.random_range(0..marks.len().max(1))) {
                Some(&start) => {
                    let end =
                        bytes[start..].iter().position(|b| b",}])| ".contains(b)).map_or(bytes.len(), |n| start + n);
                    bytes.splice(start..end, word);
                }
                None => bytes.extend(word),
            }
        }
        _ => bytes.push(rng.random()),
    }
}

fn try_all(seeds: &[Vec<u8>], words: &[&str], rounds: usize, check: impl Fn(&[u8])) {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    seeds.iter().for_each(|seed| check(seed));
    for _ in 0..rounds {
        let mut bytes = seeds[rng.random_range(0..seeds.len())].clone();
        (0..rng.random_range(1..4)).for_each(|_| damage(&mut bytes, seeds, words, &mut rng));
        check(&bytes);
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap_or("0");
    let peak = peak.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap() * 1024;
    assert!(peak < MAX_MEMORY, "{peak} bytes were taken");
}

const WORDS: [&str; 18] = [
    "null",
    "true",
    "false",
    "0",
    "-1",
    "1e400",
    "1e9",
    "18446744073709551615",
    "0.5",
    "\"\"",
    "\"x\"",
    "[]",
    "{}",
    "[1]",
    "[[]]",
    "{\"a\": 1}",
    "\"\\ud800\"",
    "\"../x\"",
];

fn body(call: u8, json: Value) -> Vec<u8> {
    [&[call][..], json.to_string().as_bytes()].concat()
}

/// To be seen to fail: an `unwrap` on a field of a request.
#[test]
fn bodies_of_requests() {
    let messages = json!([{ "role": "system", "content": "Be short." }, { "role": "user", "content": "up 3" }]);
    let parts = json!([{ "role": "user", "content": [{ "type": "text", "text": "up" }] }]);
    let called = json!([
        { "role": "user", "content": "up" },
        { "role": "assistant", "content": null, "tool_calls": [{ "id": "1", "type": "function", "function": { "name": "f", "arguments": "{\"x\": 1}" } }] },
        { "role": "tool", "tool_call_id": "1", "content": "2" },
    ]);
    let seeds = [
        body(
            0,
            json!({ "model": "a", "messages": messages, "max_tokens": 4, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["x"], "n": 2 }),
        ),
        body(
            0,
            json!({ "messages": parts, "max_completion_tokens": 4, "logprobs": true, "top_logprobs": 3, "user": "u" }),
        ),
        body(
            0,
            json!({ "messages": called, "tools": [{ "type": "function", "function": { "name": "f", "parameters": {} } }], "max_tokens": 2 }),
        ),
        body(
            0,
            json!({ "messages": messages, "stream": true, "stream_options": { "include_usage": true }, "max_tokens": 4, "lora": [{ "id": "a", "scale": 0.5 }] }),
        ),
        body(
            1,
            json!({ "model": "base", "prompt": "up 3", "max_tokens": 4, "logprobs": 2, "echo": true, "suffix": null }),
        ),
        body(
            1,
            json!({ "prompt": ["up", "down"], "max_tokens": 3, "frequency_penalty": 0.5, "presence_penalty": -0.5, "repetition_penalty": 1.1 }),
        ),
        body(
            1,
            json!({ "prompt": [[1, 5, 7], [2, 3]], "max_tokens": 3, "ignore_eos": true, "top_k": 5, "min_p": 0.1 }),
        ),
        body(2, json!({ "lora_name": "b", "lora_path": "a", "load_inplace": true })),
        body(3, json!({ "lora_name": "b" })),
        body(4, json!({ "path": "a", "mode": "upsert" })),
        body(4, json!({ "path": "a", "mode": "swap", "content_id": "sha256:x" })),
        body(6, json!({ "input": "some words", "encoding_format": "base64", "dimensions": 8, "user": "u" })),
        body(6, json!({ "input": ["some words", "others"], "model": "a", "truncate_prompt_tokens": 5 })),
        body(6, json!({ "input": [[2, 7, 9], [5]], "model": "tiny", "truncate_prompt_tokens": -1 })),
        body(6, json!({ "input": "word ".repeat(2000), "truncate_prompt_tokens": 9 })),
        body(5, json!({})),
        [&[0][..], "[".repeat(20_000).as_bytes()].concat(),
        [&[0][..], br#"{"messages": [{"role": "user", "content": ""#, "a".repeat(100_000).as_bytes(), br#""}]}"#]
            .concat(),
    ];
    // The whole ones are served, or this template or store does not have what they ask for.
    for seed in seeds[..10].iter().chain(&seeds[11..15]) {
        let (status, text) = checks::http(seed).unwrap();
        assert!(
            status == 200 || text.contains("adapter_not_found") || text.contains("the chat template refuses"),
            "{}: {status} {text}",
            String::from_utf8_lossy(seed)
        );
    }
    try_all(&seeds, &WORDS, 3000, |bytes| _ = checks::http(bytes));
}

/// A tiny base as GGUF: the tokenizer of `sentencepiece.gguf` with tensors for it.
fn tiny_gguf() -> Vec<u8> {
    let path = common::goldens("sentencepiece.gguf");
    let content = Content::read(&mut std::fs::File::open(&path).unwrap()).unwrap();
    let vocabulary = match &content.metadata["tokenizer.ggml.tokens"] {
        Meta::Array(tokens) => tokens.len(),
        other => panic!("{other:?}"),
    };
    let mut metadata = content.metadata.clone();
    metadata.insert("general.architecture".into(), Meta::String("llama".into()));
    for (key, value) in [
        ("embedding_length", 32),
        ("feed_forward_length", 32),
        ("block_count", 1),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("context_length", 64),
    ] {
        metadata.insert(format!("llama.{key}"), Meta::U32(value));
    }
    let shapes = [
        ("token_embd.weight", vec![vocabulary, 32]),
        ("output_norm.weight", vec![32]),
        ("blk.0.attn_norm.weight", vec![32]),
        ("blk.0.ffn_norm.weight", vec![32]),
        ("blk.0.attn_q.weight", vec![32, 32]),
        ("blk.0.attn_k.weight", vec![16, 32]),
        ("blk.0.attn_v.weight", vec![16, 32]),
        ("blk.0.attn_output.weight", vec![32, 32]),
        ("blk.0.ffn_gate.weight", vec![32, 32]),
        ("blk.0.ffn_up.weight", vec![32, 32]),
        ("blk.0.ffn_down.weight", vec![32, 32]),
    ];
    let tensors: Vec<(&str, QTensor)> = shapes
        .into_iter()
        .map(|(name, shape)| {
            let kind = if shape.len() == 2 { GgmlDType::Q8_0 } else { GgmlDType::F32 };
            let tensor = Tensor::ones(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
            (name, QTensor::quantize(&tensor, kind).unwrap())
        })
        .collect();
    let metadata: Vec<(&str, &Meta)> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let mut bytes = std::io::Cursor::new(Vec::new());
    write(&mut bytes, &metadata, &tensors).unwrap();
    bytes.into_inner()
}

/// To be seen to fail: the walk over the header left out.
#[test]
fn gguf_files() {
    let whole = tiny_gguf();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.gguf");
    std::fs::write(&path, &whole).unwrap();
    lorimer::prelude::Base::open(&path, &Default::default()).unwrap();
    let stored = lorimer::prelude::StoredAdapter::read(&common::goldens("adapters/lora")).unwrap();
    let json = serde_json::from_slice(&std::fs::read(common::goldens("tiny-llama/config.json")).unwrap()).unwrap();
    let config = lorimer::model::decoder::config::DecoderConfig::from_json(&json, "config.json".as_ref()).unwrap();
    lorimer::adapter::file::convert::write_gguf(&stored, &config, &path).unwrap();
    let adapter = std::fs::read(&path).unwrap();
    let seeds = [whole, adapter, std::fs::read(common::goldens("sentencepiece.gguf")).unwrap()];
    try_all(&seeds, &[], 1500, checks::gguf);
    // Numbers of the metadata that allocations depend on.
    let key = b"llama.";
    let at: Vec<usize> = seeds[0].windows(key.len()).enumerate().filter(|(_, w)| w == key).map(|(i, _)| i).collect();
    for start in at {
        for value in [0, 1, 3, 1 << 16, 1 << 31, u32::MAX] {
            let mut bytes = seeds[0].clone();
            let length = u64::from_le_bytes(bytes[start - 8..start].try_into().unwrap()) as usize;
            let value_at = start + length + 4;
            bytes[value_at..value_at + 4].copy_from_slice(&u32::to_le_bytes(value));
            checks::gguf(&bytes);
        }
    }
}

/// To be seen to fail: no check of a code's length against its shape, or of a group's number.
#[test]
fn packed_checkpoints() {
    let (mut weights, mut configs) = (Vec::new(), Vec::new());
    for (number, name) in checks::PACKED.iter().enumerate() {
        let folder = common::goldens("packed").join(name);
        let with = |kind: usize, file: &str| {
            let begin = [(number * 2 + kind) as u8];
            [&begin[..], &std::fs::read(folder.join(file)).unwrap()].concat()
        };
        weights.push(with(0, "model.safetensors"));
        configs.push(with(1, "config.json"));
        let (config, weights) = lorimer::model::base::open_weights(&folder, lorimer::prelude::LoadDtype::F32).unwrap();
        config.load(&weights).unwrap();
    }
    // Names, types, shapes and offsets stand in the header; a byte of another kind may keep the file whole.
    let words =
        ["\"U8\"", "\"I32\"", "\"F16\"", "[]", "[0]", "[0,0]", "[6,32]", "[18446744073709551615,2]", "0", "1", "4096"];
    try_all(&weights, &words, 2500, checks::packed);
    try_all(&configs, &WORDS, 2500, checks::packed);
}

/// To be seen to fail: no bound on the steps of a rendering, or on the length of its text.
#[test]
fn chat_templates() {
    let messages = r#"[{"role": "user", "content": "Hello"}, {"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}]"#;
    let own = std::fs::read_to_string(common::goldens("tiny-llama/chat_template.jinja")).unwrap();
    let sources = [
        own.as_str(),
        "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}{{ m | tojson }}{% endfor %}{{ bos_token }}",
        "{% macro f(x) %}{{ x }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{% set ns = namespace(n=0) %}{% for i in range(99) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}",
        "{{ 'x' * 4000000000 }}",
        "{{ range(10000) | list | join('xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx') }}",
        "{{ messages[0]['content'][::-1] }}{{ messages[99999999999].role }}{{ strftime_now('%Y-%Q') }}",
        "{{ (1, 2) | tojson(indent=99999999999) }}{{ raise_exception('no\nno') }}",
        "{{ '%s' | format(messages) }}{{ messages | map(attribute='role') | list }}{{ 10 ** 400 }}{{ 1 // 0 }}{{ 1 % 0 }}",
        "{{ 'ab'.center(4000000000) }}{{ 'ab'.ljust(4000000000) }}{{ 'a' | indent(4000000000) }}",
    ];
    let seed = |source: &&str| format!("{source}\0{messages}").into_bytes();
    let words = ["range(999)", "messages", "'x' * 9999", "namespace(a=1)", "-1", "9223372036854775807", "''", "none"];
    try_all(&sources.iter().map(seed).collect::<Vec<_>>(), &words, 500, checks::template);
    // Templates that never end, or double what they have.
    for source in [
        "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "{% for i in range(100000) %}{% for j in range(100000) %}{{ messages | tojson }}{% endfor %}{% endfor %}",
    ] {
        checks::template(&seed(&source));
    }
    // Nesting, which recursion pays for.
    for deep in ["(", "[", "{{ (", "{% if true %}", "{% for i in [1] %}", "not ", "-", "{% set x %}"] {
        checks::template(format!("{{{{ {} }}}}", deep.repeat(2_000)).as_bytes());
        checks::template(deep.repeat(2_000).as_bytes());
    }
    let nested = format!(
        "{{{{ messages | tojson }}}}\0[{{\"role\": \"user\", \"content\": {}1{}}}]",
        "[".repeat(100),
        "]".repeat(100)
    );
    checks::template(nested.as_bytes());
}

/// To be seen to fail: sizes of a record that are bounded one by one.
#[test]
fn records_of_pruning() {
    let model = common::goldens("tiny-llama");
    let (config, weights) = lorimer::model::base::open_weights(&model, lorimer::prelude::LoadDtype::F32).unwrap();
    let config = config.decoder("a test").unwrap();
    let identity = lorimer::adapter::algebra::slice::identity_of(config, &weights, "base").unwrap();
    let kept = serde_json::from_slice(&std::fs::read(common::goldens("pruning/kept.json")).unwrap()).unwrap();
    let record = lorimer::adapter::Pruning::new(config, identity, ("rand", json!({ "seed": 1 })), kept).unwrap();
    let whole = serde_json::to_vec(&record).unwrap();
    let (trained, folder) = (common::goldens("pruning/small"), tempfile::tempdir().unwrap());
    let output = folder.path().join("recovered");
    assert!(lorimer::adapter::algebra::recover::recover(&trained, &record, true, &output).is_ok());
    let sizes = ["1", "2", "8", "1024", "65536", "1048576", "16777216", "4294967296", "4611686018427387904"];
    try_all(std::slice::from_ref(&whole), &[&WORDS[..], &sizes[..]].concat(), 3000, checks::pruning);
    // Every number of it by every size.
    let text = String::from_utf8(whole).unwrap();
    let starts = text.match_indices([':', '[', ',']).map(|(i, _)| i + 1);
    for start in starts.filter(|i| text[*i..].starts_with(|c: char| c.is_ascii_digit())) {
        let end = start + text[start..].find(|c: char| !c.is_ascii_digit()).unwrap();
        for size in sizes {
            checks::pruning(format!("{}{size}{}", &text[..start], &text[end..]).as_bytes());
        }
    }
}

/// To be seen to fail: a span of a tensor taken on trust, or a manifest without a bound.
#[test]
fn adapters_that_are_combined() {
    let read = |name: &str| std::fs::read(common::goldens(name)).unwrap();
    let manifest = json!({
        "format": 1, "content_id": "sha256:0", "method": "lora", "lorimer": "0", "chat_template": "{{ x }}", "training": { "steps": 3 },
        "base": { "name": "b", "fingerprint": "sha256:1", "model_type": "llama", "pruned": { "pruning": "sha256:2", "name": "w", "fingerprint": "sha256:3", "layers": [[1, 1, 2]] } },
        "golden": [{ "tokens": [1, 2, 3], "first": 1, "log_probabilities": [-0.5, -1.5] }],
        "xlora": { "sites": ["model.layers.0.self_attn.q_proj"], "experts": ["sha256:4"] },
    });
    let with = |kind: u8, bytes: &[u8]| [&[kind], bytes].concat();
    let seeds = [
        with(0, &read("combine/plain/adapter_config.json")),
        with(1, &read("combine/plain/adapter_model.safetensors")),
        with(2, manifest.to_string().as_bytes()),
    ];
    let words = [&WORDS[..], &["\"F16\"", "\"I64\"", "[0,0]", "[18446744073709551615,2]", "[0,8]"]].concat();
    for seed in &seeds {
        try_all(std::slice::from_ref(seed), &words, 300, checks::combination);
    }
}

/// To be seen to fail: layers of a head that do not multiply, left out.
#[test]
fn folders_of_x_loras_authors() {
    let (mut heads, mut configs) = (Vec::new(), Vec::new());
    for (number, name) in checks::XLORA.iter().enumerate() {
        let read = |kind: usize, file: &str| {
            let bytes = std::fs::read(common::goldens("xlora").join(name).join(file)).unwrap();
            [&[(number * 2 + kind) as u8][..], &bytes].concat()
        };
        heads.push(read(0, "xlora_classifier.safetensors"));
        configs.push(read(1, "xlora_config.json"));
    }
    let words = ["\"F16\"", "\"I64\"", "[]", "[0]", "[0,0]", "[16,16]", "[18446744073709551615,2]", "0", "1", "4096"];
    try_all(&heads, &words, 800, checks::xlora);
    try_all(
        &configs,
        &[&WORDS[..], &["64", "[\"chemistry\"]", "{\"chemistry\": \"x\"}"]].concat(),
        1200,
        checks::xlora,
    );
}

#[test]
fn adapters_configurations_and_data() {
    let read = |name: &str| std::fs::read(common::goldens(name)).unwrap();
    let methods = ["lora", "dora", "miss", "vera", "randlora", "shira", "rank_pattern", "modules_to_save"];
    let weights: Vec<_> = methods.iter().map(|m| read(&format!("adapters/{m}/adapter_model.safetensors"))).collect();
    try_all(&weights, &WORDS, 1500, checks::adapter);
    let mut configs: Vec<_> = methods.iter().map(|m| read(&format!("adapters/{m}/adapter_config.json"))).collect();
    configs
        .extend(["tiny-llama", "tiny-llama3", "tiny-qwen2", "tiny-qwen3"].map(|m| read(&format!("{m}/config.json"))));
    try_all(&configs, &WORDS, 3000, checks::config);
    let data = [
        b"\0{\"messages\": [{\"role\": \"user\", \"content\": \"up\"}, {\"role\": \"assistant\", \"content\": \"yes\"}]}\n{\"text\": 1}\n".to_vec(),
        b"\x01[{\"instruction\": \"a\", \"input\": \"b\", \"output\": \"c\"}, null, 3]".to_vec(),
        b"\x02prompt,completion\n\"a,\"\"b\",c\nd,\n".to_vec(),
        [&[3][..], &read("rows.parquet")].concat(),
        b"\0{\"conversations\": [{\"from\": \"human\", \"value\": \"up\"}, {\"from\": \"gpt\", \"value\": \"yes\"}]}\n".to_vec(),
    ];
    try_all(&data, &WORDS, 2500, checks::data);
}
