//! Trains a LoRA on rows of `data/` and writes it to `runs/example`, a folder that PEFT loads too:
//!
//! `cargo run --release --example train` in the root of the repository; the base is fetched the first time.

use std::sync::atomic::AtomicBool;

use lorimer::prelude::*;
use lorimer::train::Event;
use lorimer::train::data::encode::load;

fn main() -> anyhow::Result<()> {
    let pulled = pull("smollm2-135m", PullOptions::default())?;
    let base = Base::open(&pulled.path, &OpenOptions::default())?;
    let (train, _) = load("data/sentiment-movies.train.jsonl".as_ref(), &base.text, &EncodeOptions::default())?;
    let method = methods::build("lora", serde_json::json!({ "r": 8, "lora_alpha": 16 }).as_object().unwrap())?;
    let session = Session {
        base: &base,
        base_name: &pulled.name,
        train: &train,
        eval: &[],
        settings: TrainSettings { learning_rate: 1e-3, max_steps: Some(20), ..Default::default() },
        start: None,
        output: "runs/example".into(),
        save_steps: None,
        save_limit: 1,
        resume: false,
        overwrite: true,
        data_names: vec!["sentiment-movies.train.jsonl".into()],
        stop: &AtomicBool::new(false),
    };
    let (outcome, adapter) = session.run(method, |event| {
        if let Event::Step { record, .. } = event {
            println!("step {}: loss {:.4}", record.step, record.loss.unwrap_or(f64::NAN));
        }
    })?;
    println!("{} parameters trained in {:.0} s", adapter.parameter_count(), outcome.seconds);
    Ok(())
}
