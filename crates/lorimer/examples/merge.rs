//! Merges the adapter that the example `train` wrote into its base, and asks base with adapter and merged weights the same:
//!
//! `cargo run --release --example merge` in the root of the repository.

use lorimer::adapter::algebra::merge::merge_to_folder;
use lorimer::prelude::*;
use serde_json::json;

const QUESTION: &str = "Is this movie review negative, neutral or positive?\n\nA warm, funny film that stays with you.";

fn ask(base: &Base, adaptation: &dyn Adaptation) -> anyhow::Result<String> {
    let text = base.text.needed_template()?.render(&[json!({ "role": "user", "content": QUESTION })], None, true)?;
    let prompt = base.text.encode(&text, false)?.ids;
    Ok(generate(base.model(), &base.text, adaptation, &prompt, 8, &Sampling::default(), 0, &[], |_| {})?.text)
}

fn main() -> anyhow::Result<()> {
    let pulled = pull("smollm2-135m", PullOptions::default())?;
    let stored = StoredAdapter::read("runs/example".as_ref())?;
    let base = Base::open(&pulled.path, &OpenOptions::default())?;
    println!("with the adapter: {}", ask(&base, &Attached::one(&Adapter::load_whole(base.model(), &stored)?))?);

    let output = "runs/example-merged".as_ref();
    let merged = merge_to_folder(&pulled.path, &[(stored, 1.0)], output, LoadDtype::F32, |_| {})?;
    println!("{} tensors merged into {}", merged.merged_tensors, merged.output);
    println!("merged:           {}", ask(&Base::open(output, &OpenOptions::default())?, &Frozen)?);
    Ok(())
}
