//! The model card that stands beside an adapter.

use serde_json::Value;

use crate::file::store::StoredAdapter;

/// `README.md` with the front matter that the hub reads.
pub fn card(adapter: &StoredAdapter, folder: &str, metrics: &[(String, String)]) -> String {
    let text = |key: &str| adapter.config.get(key).map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_string));
    let base = text("base_model_name_or_path").unwrap_or_default();
    let manifest = adapter.manifest.as_ref();
    let method = manifest.map_or("lora", |m| m.method.as_str());
    let on_hub = !base.contains('\\') && !base.starts_with(['/', '.']) && base.matches('/').count() == 1;
    let mut out = String::from("---\n");
    if on_hub {
        out += &format!("base_model: {base}\n");
    }
    out += "library_name: peft\npipeline_tag: text-generation\ntags:\n- lora\n- transformers\n- lorimer\n";
    if on_hub {
        out += &format!("- base_model:adapter:{base}\n");
    }
    out += &format!("---\n\n# A {method} adapter for {base}\n\n");
    out += "| setting | value |\n|---|---|\n";
    let mut row = |name: &str, value: String| out += &format!("| {name} | {value} |\n");
    row("method", method.to_string());
    for (name, key) in
        [("rank", "r"), ("alpha", "lora_alpha"), ("dropout", "lora_dropout"), ("target modules", "target_modules")]
    {
        if let Some(value) = text(key) {
            row(name, value.replace('|', "\\|"));
        }
    }
    if let Some(manifest) = manifest {
        if let Value::Object(training) = &manifest.training {
            for (key, value) in training {
                let value = value.as_str().map_or_else(|| value.to_string(), str::to_string);
                row(&key.replace('_', " "), value.replace('|', "\\|"));
            }
        }
        row("content id", format!("`{}`", manifest.content_id));
    }
    if !metrics.is_empty() {
        out += "\n## Measured\n\n| figure | value |\n|---|---|\n";
        for (name, value) in metrics {
            out += &format!("| {name} | {value} |\n");
        }
    }
    out += &format!(
        "\n## Use\n\n```python\nfrom peft import AutoPeftModelForCausalLM\nmodel = AutoPeftModelForCausalLM.from_pretrained(\"{folder}\")\n```\n\n```sh\nlorimer generate --model {base} --adapter {folder} --prompt \"…\"\n```\n"
    );
    out
}
