//! Serves the base and every adapter below `runs/`, as the one that the example `train` wrote, until it is ended (Ctrl-C):
//!
//! `cargo run --release --example serve` in the root of the repository, and then
//! `curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"model": "example", "prompt": "Hello", "max_tokens": 8}'`.

use std::sync::Arc;
use std::time::Duration;

use lorimer::adapter::pruning::BaseRecord;
use lorimer::prelude::*;
use lorimer::serve::http::{App, Keys, address, serve};
use lorimer::serve::{EngineSettings, Store, StoreSettings, Worker};

fn main() -> anyhow::Result<()> {
    let pulled = pull("smollm2-135m", PullOptions::default())?;
    let base = Arc::new(Base::open(&pulled.path, &OpenOptions::default())?);
    // An adapter of a pruned model is served on that model only.
    let record = BaseRecord::of(&base.path, &base.model().shape().layers)?;
    let store = Arc::new(Store::open(StoreSettings { base: Some(record), ..StoreSettings::new("runs") })?);
    println!("adapters: {}", store.list().iter().map(|a| a.name.as_str()).collect::<Vec<_>>().join(", "));
    let worker = Worker::start(base.clone(), EngineSettings::default())?;
    // Only this machine reaches it, so that it needs no keys.
    let address = address("127.0.0.1", 8000).map_err(anyhow::Error::msg)?;
    let app = App::new(base, pulled.name, Some(store), worker, Keys::default(), address.ip().is_loopback());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(address).await?;
        println!("listening at http://{address}");
        serve(listener, app, None, std::future::pending(), (Duration::ZERO, Duration::from_secs(30))).await?;
        Ok(())
    })
}
