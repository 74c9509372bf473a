//! Any bytes as `adapter_model.safetensors`, beside a plain configuration: `cargo fuzz run adapter`.
#![no_main]
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("adapter_config.json"), r#"{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}"#).unwrap();
    std::fs::write(folder.path().join("adapter_model.safetensors"), bytes).unwrap();
    if let Ok(stored) = lorimer_adapter::StoredAdapter::read(folder.path()) {
        let _ = lorimer_adapter::inspect::inspect(&stored);
    }
});
