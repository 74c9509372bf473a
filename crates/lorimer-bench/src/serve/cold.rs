//! Tokens of running streams while adapters are loaded.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::{Ask, BenchServe, Server, name, send};

/// Streams the answers and gives the seconds between two tokens of each.
async fn stream(client: reqwest::Client, url: Arc<String>, ask: Ask) -> Result<Vec<f64>> {
    let body = json!({
        "model": name(ask.adapter), "prompt": ask.prompt, "max_tokens": ask.output, "temperature": 0, "ignore_eos": true,
        "stream": true, "user": "bench",
    });
    let mut response = client.post(&*url).json(&body).send().await?;
    if !response.status().is_success() {
        bail!("the server answers {}", response.status());
    }
    let (mut gaps, mut last, mut buffer) = (Vec::new(), None, String::new());
    while let Some(chunk) = response.chunk().await? {
        let now = Instant::now();
        buffer.push_str(std::str::from_utf8(&chunk).context("the stream is no text")?);
        while let Some(end) = buffer.find("\n\n") {
            let event: String = buffer.drain(..end + 2).collect();
            let Some(Ok(event)) = event.trim().strip_prefix("data: ").map(serde_json::from_str::<Value>) else {
                continue;
            };
            if event["choices"][0]["text"].is_string()
                && let Some(before) = last.replace(now)
            {
                gaps.push(now.duration_since(before).as_secs_f64());
            }
        }
    }
    Ok(gaps)
}

/// All streams of a round at once.
async fn streams(client: &reqwest::Client, url: &Arc<String>, asks: Vec<Ask>) -> Result<Vec<f64>> {
    let mut tasks = tokio::task::JoinSet::new();
    for ask in asks {
        tasks.spawn(stream(client.clone(), url.clone(), ask));
    }
    let mut gaps = Vec::new();
    while let Some(one) = tasks.join_next().await {
        gaps.extend(one??);
    }
    gaps.sort_by(f64::total_cmp);
    Ok(gaps)
}

/// Requests of one token for adapters, one after the other, `rate` a second until told to stop; seconds of each answer.
async fn ask(
    client: reqwest::Client,
    url: Arc<String>,
    adapters: Vec<usize>,
    rate: f64,
    stop: Arc<AtomicBool>,
) -> Result<Vec<f64>> {
    let (clock, mut tasks) = (Instant::now(), tokio::task::JoinSet::new());
    for (i, adapter) in adapters.into_iter().enumerate() {
        let at = clock + Duration::from_secs_f64(i as f64 / rate);
        tokio::time::sleep_until(at.into()).await;
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let (client, url) = (client.clone(), url.clone());
        tasks.spawn(async move {
            let begun = Instant::now();
            let body =
                json!({ "model": name(adapter), "prompt": [3], "max_tokens": 1, "ignore_eos": true, "user": "cold" });
            send(&client, &url, &body).await?;
            anyhow::Ok(begun.elapsed().as_secs_f64())
        });
    }
    let mut seconds = Vec::new();
    while let Some(one) = tasks.join_next().await {
        seconds.push(one??);
    }
    Ok(seconds)
}

/// Streams beside requests for these adapters: times between tokens, times of the requests, and seconds of all.
async fn beside(
    client: &reqwest::Client,
    url: &Arc<String>,
    asks: Vec<Ask>,
    adapters: Vec<usize>,
    rate: f64,
) -> Result<(Vec<f64>, Vec<f64>, f64)> {
    let stop = Arc::new(AtomicBool::new(false));
    let asked = tokio::spawn(ask(client.clone(), url.clone(), adapters, rate, stop.clone()));
    let clock = Instant::now();
    let gaps = streams(client, url, asks).await?;
    let seconds = clock.elapsed().as_secs_f64();
    stop.store(true, Ordering::Relaxed);
    let mut asked = asked.await??;
    asked.sort_by(f64::total_cmp);
    Ok((gaps, asked, seconds))
}

fn quantile(sorted: &[f64], q: f64) -> f64 {
    sorted
        .get(((sorted.len() as f64 * q).ceil() as usize).clamp(1, sorted.len().max(1)) - 1)
        .copied()
        .unwrap_or(f64::NAN)
}

impl BenchServe {
    /// Two rounds of streams on a server beside requests of one token: for adapters that are at work, then for cold ones; the row to show.
    pub(super) async fn cold(&self, server: &Server, asks: Vec<Ask>, adapters: usize, rate: f64) -> Result<Value> {
        let client = lorimer_model::http::client().no_proxy().pool_max_idle_per_host(64).build()?;
        let url = Arc::new(format!("{}/v1/completions", server.url));
        let mut seen = HashSet::new();
        for ask in asks.iter().filter(|a| seen.insert(a.adapter)) {
            send(&client, &url, &json!({ "model": name(ask.adapter), "prompt": [1, 2, 3], "max_tokens": 1 })).await?;
        }
        let first = asks.iter().map(|a| a.adapter + 1).max().unwrap_or(0);
        if first >= adapters {
            bail!("--cold-loads needs more --adapters than --requests: those beyond the streams' own are loaded");
        }
        // The same requests in both rounds, so that what differs is the loading.
        let hot: Vec<usize> = (first..adapters).map(|i| i % first).collect();
        let (before, ..) = beside(&client, &url, asks.clone(), hot, rate).await?;
        // Other tokens than before, so that no prompt is kept.
        let turned = asks.into_iter().map(|mut a| {
            a.prompt.reverse();
            a
        });
        let (during, loads, seconds) =
            beside(&client, &url, turned.collect(), (first..adapters).collect(), rate).await?;
        Ok(json!({
            "name": "lorimer", "adapters": adapters, "loads": loads.len(), "loads_per_second": loads.len() as f64 / seconds,
            "load_p50": quantile(&loads, 0.5), "load_p99": quantile(&loads, 0.99),
            "gap_p50": quantile(&before, 0.5), "gap_p99": quantile(&before, 0.99),
            "gap_p50_while_loading": quantile(&during, 0.5), "gap_p99_while_loading": quantile(&during, 0.99),
            "p99_ratio": quantile(&during, 0.99) / quantile(&before, 0.99),
            "output_tokens_per_second": during.len() as f64 / seconds,
        }))
    }
}
