//! Figures: for Prometheus, with vLLM's names where vLLM has one, and as JSON for the page.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::app::App;
use crate::engine::EngineState;
use crate::engine::pool::BLOCK;
use crate::engine::worker::Histogram;
use crate::trace::Exporter;

/// One family of the exposition format.
fn family(out: &mut String, name: &str, kind: &str, help: &str, samples: &[(String, f64)]) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
    for (labels, value) in samples {
        let _ = writeln!(out, "{name}{labels} {value}");
    }
}

fn histogram(out: &mut String, name: &str, help: &str, model: &str, h: &Histogram) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram");
    let mut below = 0;
    for (i, count) in h.counts.iter().enumerate() {
        below += count;
        let bound = h.bounds.get(i).map_or("+Inf".to_string(), f64::to_string);
        let _ = writeln!(out, "{name}_bucket{{model_name=\"{model}\",le=\"{bound}\"}} {below}");
    }
    let _ = writeln!(out, "{name}_sum{{model_name=\"{model}\"}} {}", h.sum);
    let _ = writeln!(out, "{name}_count{{model_name=\"{model}\"}} {below}");
}

fn escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// Pages with keys and values that requests use, and their share of the pages that they could use: what is only kept for later (blocks of the
/// prefix cache, adapters that no request uses) gives way to them, adapters at work do not.
fn keys(engine: &EngineState) -> (usize, f64) {
    let others = engine.free_pages + engine.cached_pages + engine.adapter_pages;
    let used = engine.pages.saturating_sub(others);
    let most = engine.pages.saturating_sub(engine.adapter_pages_at_work);
    (used, used as f64 / most.max(1) as f64)
}

/// `GET /metrics`.
#[utoipa::path(get, path = "/metrics", tag = "operation", responses((status = 200, description = "Figures for Prometheus", body = String, content_type = "text/plain")))]
pub async fn prometheus(State(app): State<Arc<App>>) -> Response {
    let f = app.worker.figures();
    let model = escape(&app.name);
    let one = |value: f64| [(format!("{{model_name=\"{model}\"}}"), value)];
    let mut out = String::new();
    let gauge = |out: &mut String, name: &str, help: &str, value: f64| family(out, name, "gauge", help, &one(value));
    let counter =
        |out: &mut String, name: &str, help: &str, value: u64| family(out, name, "counter", help, &one(value as f64));
    gauge(&mut out, "vllm:num_requests_running", "Requests in the batch.", f.engine.running as f64);
    gauge(&mut out, "vllm:num_requests_waiting", "Requests that wait.", f.engine.waiting as f64);
    let (used, usage) = keys(&f.engine);
    gauge(
        &mut out,
        "vllm:kv_cache_usage_perc",
        "Pages with keys and values of requests as a share of those that adapters at work leave (1 = all).",
        usage,
    );
    let dtype = app.worker.kv_cache_dtype().name();
    let blocks = f.engine.pages / app.base.model().shape().layers.len().max(1);
    family(
        &mut out,
        "vllm:cache_config_info",
        "gauge",
        "Tokens of a block and blocks of the pool, were all of it keys and values, and how these are kept.",
        &[(format!("{{block_size=\"{BLOCK}\",cache_dtype=\"{dtype}\",num_gpu_blocks=\"{blocks}\"}}"), 1.0)],
    );
    let names = |names: &[String]| escape(&names.join(","));
    let adapters = &f.adapters;
    let labels = format!(
        "{{max_lora=\"{}\",running_lora_adapters=\"{}\",waiting_lora_adapters=\"{}\"}}",
        app.worker.most_adapters(),
        names(&adapters.running),
        names(&adapters.waiting)
    );
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
    family(
        &mut out,
        "vllm:lora_requests_info",
        "gauge",
        "Adapters of running and waiting requests; the value is the time.",
        &[(labels, now)],
    );
    counter(&mut out, "vllm:prompt_tokens_total", "Prompt tokens computed.", f.engine.prompt_tokens);
    counter(&mut out, "vllm:generation_tokens_total", "Tokens generated.", f.engine.generated_tokens);
    counter(
        &mut out,
        "vllm:prefix_cache_hits_total",
        "Prompt tokens that the prefix cache had.",
        f.engine.cached_tokens,
    );
    counter(&mut out, "vllm:spec_decode_num_draft_tokens_total", "Tokens that were guessed.", f.engine.guessed_tokens);
    counter(
        &mut out,
        "vllm:spec_decode_num_accepted_tokens_total",
        "Guessed tokens that were drawn.",
        f.engine.accepted_tokens,
    );
    histogram(&mut out, "vllm:time_to_first_token_seconds", "Seconds to the first token.", &model, &f.first_token);
    histogram(&mut out, "vllm:inter_token_latency_seconds", "Seconds between two tokens.", &model, &f.between_tokens);
    histogram(&mut out, "vllm:e2e_request_latency_seconds", "Seconds to the last token.", &model, &f.whole);
    counter(&mut out, "lorimer_requests_answered_total", "Requests answered.", f.answered);
    counter(&mut out, "lorimer_requests_refused_total", "Requests refused.", f.refused);
    counter(&mut out, "lorimer_requests_cancelled_total", "Requests whose client went away.", f.cancelled);
    counter(&mut out, "lorimer_requests_failed_total", "Requests that failed.", f.failed);
    counter(&mut out, "lorimer_engine_restarts_total", "Times that the engine was made anew.", f.restarts);
    counter(&mut out, "lorimer_adapter_loads_total", "Copies of adapters into the pool.", f.engine.adapter_loads);
    counter(
        &mut out,
        "lorimer_adapter_evictions_total",
        "Adapters that left the pool for others.",
        f.engine.adapter_evictions,
    );
    let kinds = [
        ("free", f.engine.free_pages),
        ("keys", used),
        ("cached", f.engine.cached_pages),
        ("adapters", f.engine.adapter_pages),
    ];
    let pages: Vec<_> = kinds.iter().map(|(kind, n)| (format!("{{kind=\"{kind}\"}}"), *n as f64)).collect();
    family(&mut out, "lorimer_pool_pages", "gauge", "Pages of the pool by what is in them.", &pages);
    let (bytes, count) = app.store.as_ref().map_or((0, 0), |store| store.host());
    gauge(&mut out, "lorimer_host_adapter_bytes", "Bytes of adapters in host memory.", bytes as f64);
    gauge(&mut out, "lorimer_host_adapters", "Adapters in host memory.", count as f64);
    if let Some([exported, full, lost]) = app.exporter.get().map(Exporter::figures) {
        counter(&mut out, "lorimer_spans_exported_total", "Spans that the collector took.", exported);
        let reasons = [("queue_full", full), ("not_delivered", lost)];
        let dropped: Vec<_> = reasons.iter().map(|(why, n)| (format!("{{reason=\"{why}\"}}"), *n as f64)).collect();
        family(&mut out, "lorimer_spans_dropped_total", "counter", "Spans that did not reach the collector.", &dropped);
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], out).into_response()
}

/// `GET /v1/state`: the same for people's programs.
#[utoipa::path(get, path = "/v1/state", tag = "inference", responses((status = 200, description = "Figures of engine, store and requests", body = Object)))]
pub async fn state(State(app): State<Arc<App>>) -> Json<Value> {
    let (bytes, count) = app.store.as_ref().map_or((0, 0), |store| store.host());
    Json(json!({
        "base": app.name,
        "figures": app.worker.figures(),
        "kv_cache_dtype": app.worker.kv_cache_dtype().name(),
        "host_adapter_bytes": bytes,
        "host_adapters": count,
        "stopping": app.worker.is_stopping(),
        "draining": app.draining.load(Ordering::Relaxed),
        "uploads": app.uploads.load(Ordering::Relaxed),
        "problems": app.problems(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// To be seen to fail: a share of all pages, or blocks that are only kept counted as used.
    #[test]
    fn usage_is_of_what_requests_could_have() {
        let idle =
            EngineState { pages: 100, free_pages: 10, cached_pages: 30, adapter_pages: 60, ..Default::default() };
        assert_eq!(keys(&idle), (0, 0.0));
        let full = EngineState { cached_pages: 0, free_pages: 0, adapter_pages_at_work: 60, ..idle };
        assert_eq!(keys(&full), (40, 1.0));
        let half = EngineState { cached_pages: 10, free_pages: 10, adapter_pages_at_work: 60, ..idle };
        assert_eq!(keys(&half), (20, 0.5));
        assert_eq!(keys(&EngineState::default()), (0, 0.0));
    }
}
