//! Any bytes as a model's and an adapter's configuration: `cargo fuzz run config`.
#![no_main]
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(json) = serde_json::from_slice::<serde_json::Value>(bytes) else { return };
    if let Ok(config) = lorimer_model::config::LlamaConfig::from_json(&json, "config.json".as_ref()) {
        let _ = config.rotary();
    }
    if let serde_json::Value::Object(map) = &json
        && let Ok(method) = lorimer_adapter::methods::from_adapter_config(map)
    {
        let _ = lorimer_adapter::targets::Matcher::new(method.targeting());
    }
});
