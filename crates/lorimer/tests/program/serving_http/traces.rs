//! Requests in traces: whose they are, and what a collector of OpenTelemetry is told of them.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::sync::{Arc, Mutex};

use super::*;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const SPAN: &str = "00f067aa0ba902b7";

/// The heads and bodies of requests.
type Kept = Arc<Mutex<Vec<(String, Vec<u8>)>>>;

/// A collector that keeps what it is sent.
struct Collector {
    url: String,
    sent: Kept,
}

impl Collector {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let sent = Arc::<Mutex<Vec<_>>>::default();
        let kept = sent.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let kept = kept.clone();
                std::thread::spawn(move || {
                    let mut reader = BufReader::new(stream);
                    loop {
                        let (mut head, mut line) = (String::new(), String::new());
                        while reader.read_line(&mut line).is_ok_and(|n| n > 2) {
                            head += &std::mem::take(&mut line).to_lowercase();
                        }
                        let length =
                            head.split("content-length: ").nth(1).and_then(|l| l.lines().next()?.trim().parse().ok());
                        let Some(length) = length else { return };
                        let mut body = vec![0; length];
                        reader.read_exact(&mut body).unwrap();
                        kept.lock().unwrap().push((head, body));
                        let _ = reader.get_mut().write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
                    }
                });
            }
        });
        Self { url, sent }
    }

    /// Waits for so many spans.
    fn spans(&self, count: usize) -> Vec<Sent> {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let all: Vec<Sent> = self.sent.lock().unwrap().iter().flat_map(|(_, body)| spans(body)).collect();
            if all.len() >= count {
                return all;
            }
            assert!(Instant::now() < deadline, "{all:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// A span as it was sent.
#[derive(Debug)]
struct Sent {
    trace: String,
    id: String,
    parent: String,
    state: String,
    name: String,
    kind: u64,
    seconds: f64,
    failed: bool,
    attributes: BTreeMap<String, Value>,
}

enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

fn fields(mut message: &[u8]) -> Vec<(u64, Field<'_>)> {
    fn number(message: &mut &[u8]) -> u64 {
        let end = message.iter().position(|b| b & 0x80 == 0).unwrap() + 1;
        let (own, rest) = message.split_at(end);
        *message = rest;
        own.iter().rev().fold(0, |n, b| n << 7 | u64::from(b & 0x7f))
    }
    let mut all = Vec::new();
    while !message.is_empty() {
        let tag = number(&mut message);
        let width = match tag & 7 {
            0 => {
                all.push((tag >> 3, Field::Number(number(&mut message))));
                continue;
            }
            1 => 8,
            5 => 4,
            _ => number(&mut message) as usize,
        };
        let (own, rest) = message.split_at(width);
        message = rest;
        let little = |own: &[u8]| own.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b));
        all.push((tag >> 3, if tag & 7 == 2 { Field::Bytes(own) } else { Field::Number(little(own)) }));
    }
    all
}

/// The messages in a field of a message.
fn within(message: &[u8], wanted: u64) -> Vec<&[u8]> {
    let of = |(number, field)| match field {
        Field::Bytes(bytes) if number == wanted => Some(bytes),
        _ => None,
    };
    fields(message).into_iter().filter_map(of).collect()
}

fn number(message: &[u8], wanted: u64) -> u64 {
    let of = |(number, field)| match field {
        Field::Number(n) if number == wanted => Some(n),
        _ => None,
    };
    fields(message).into_iter().find_map(of).unwrap_or(0)
}

fn any(value: &[u8]) -> Value {
    match fields(value).remove(0) {
        (1, Field::Bytes(text)) => String::from_utf8(text.to_vec()).unwrap().into(),
        (3, Field::Number(n)) => n.into(),
        (4, Field::Number(bits)) => f64::from_bits(bits).into(),
        (5, Field::Bytes(list)) => within(list, 1).into_iter().map(any).collect(),
        (other, _) => panic!("a value of kind {other}"),
    }
}

fn attributes(message: &[u8], wanted: u64) -> BTreeMap<String, Value> {
    let one = |pair: &[u8]| (String::from_utf8(within(pair, 1)[0].to_vec()).unwrap(), any(within(pair, 2)[0]));
    within(message, wanted).into_iter().map(one).collect()
}

fn spans(body: &[u8]) -> Vec<Sent> {
    let hex =
        |message: &[u8], field| within(message, field).concat().iter().map(|b| format!("{b:02x}")).collect::<String>();
    let text = |message: &[u8], field| String::from_utf8(within(message, field).concat()).unwrap();
    let one = |span: &[u8]| Sent {
        trace: hex(span, 1),
        id: hex(span, 2),
        state: text(span, 3),
        parent: hex(span, 4),
        name: text(span, 5),
        kind: number(span, 6),
        seconds: (number(span, 8) - number(span, 7)) as f64 / 1e9,
        attributes: attributes(span, 9),
        failed: number(&within(span, 15).concat(), 3) == 2,
    };
    let scopes = within(body, 1).into_iter().flat_map(|resource| within(resource, 2));
    scopes.flat_map(|scope| within(scope, 2)).map(one).collect()
}

/// A field of an answer's head.
fn header<'a>(answer: &'a Answer, name: &str) -> Option<&'a str> {
    answer.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

fn ask(server: &Server, headers: &str, more: Value) -> Answer {
    let body = with(
        &json!({ "model": "yes-no", "temperature": 0, "max_tokens": 8, "messages": [{ "role": "user", "content": "up 3" }] }),
        more,
    );
    server.request(
        "POST",
        "/v1/chat/completions",
        &format!("Content-Type: application/json\r\n{headers}"),
        &body.to_string(),
    )
}

/// A caller's trace goes on in the answer's header and in the span, with what was asked for and what came; a caller that does not record has
/// no span; whoever sends nonsense begins a trace of its own; the end of the server loses nothing. To be seen to fail: spans ended at the
/// head of a stream, flags not looked at, no `finish` at the end.
#[test]
fn requests_have_spans() {
    let f = Fixture::new();
    let root = adapters(&f);
    let collector = Collector::start();
    let variables = [("OTEL_SERVICE_NAME", "test"), ("OTEL_EXPORTER_OTLP_HEADERS", "x-key=secret%20key")];
    let mut server = Server::start_with(&f, &root, &["--otlp-traces-endpoint", &collector.url], &variables);
    let parent = format!("traceparent: 00-{TRACE}-{SPAN}-01\r\n");
    let whole =
        ask(&server, &format!("{parent}tracestate: a=1\r\ntracestate: b=2\r\n"), json!({ "top_p": 0.5, "seed": 3 }));
    assert_eq!(whole.status, 200, "{}", whole.body);
    let told = header(&whole, "traceresponse").unwrap().to_string();
    let streamed = ask(&server, &parent, json!({ "stream": true, "n": 2, "model": "base", "ignore_eos": true }));
    assert!(streamed.body.contains("[DONE]"));
    let not_recorded = ask(&server, &parent.replace("-01\r", "-00\r"), json!({}));
    assert!(header(&not_recorded, "traceresponse").unwrap().starts_with(&format!("00-{TRACE}-")));
    assert!(header(&not_recorded, "traceresponse").unwrap().ends_with("-00"));
    let refused = ask(&server, "traceparent: 00-zz\r\ntracestate: a=1\r\n", json!({ "model": "nobody" }));
    assert_eq!(refused.status, 404);
    assert!(server.get("/health").status == 200 && header(&server.get("/health"), "traceresponse").is_none());
    let all = collector.spans(3);
    assert_eq!(all.len(), 3, "{all:?}");
    let [one, two, three] = &all[..] else { unreachable!() };
    assert_eq!((one.trace.as_str(), one.parent.as_str(), one.state.as_str()), (TRACE, SPAN, "a=1,b=2"));
    assert_eq!(told, format!("00-{TRACE}-{}-01", one.id));
    assert_eq!((one.name.as_str(), one.kind, one.failed), ("chat yes-no", 2, false));
    let usage = whole.json()["usage"].clone();
    for (key, value) in [
        ("gen_ai.operation.name", json!("chat")),
        ("gen_ai.request.model", json!("yes-no")),
        ("gen_ai.response.model", json!("yes-no")),
        ("gen_ai.response.id", whole.json()["id"].clone()),
        ("gen_ai.request.max_tokens", json!(8)),
        ("gen_ai.request.temperature", json!(0.0)),
        ("gen_ai.request.top_p", json!(0.5)),
        ("gen_ai.request.seed", json!(3)),
        ("gen_ai.usage.input_tokens", usage["prompt_tokens"].clone()),
        ("gen_ai.usage.output_tokens", usage["completion_tokens"].clone()),
        ("gen_ai.response.finish_reasons", json!(["stop"])),
        ("lorimer.adapters", json!(["yes-no"])),
        ("http.route", json!("/v1/chat/completions")),
        ("http.response.status_code", json!(200)),
    ] {
        assert_eq!(one.attributes.get(key), Some(&value), "{key}: {one:?}");
    }
    for span in [one, two] {
        let seconds = |name: &str| span.attributes[&format!("gen_ai.latency.{name}")].as_f64().unwrap();
        let (queue, first, e2e) = (seconds("time_in_queue"), seconds("time_to_first_token"), seconds("e2e"));
        assert!(0.0 <= queue && queue <= first && first <= e2e && (e2e - span.seconds).abs() < 1e-3, "{span:?}");
    }
    assert_eq!(two.attributes["gen_ai.usage.output_tokens"], json!(16), "{two:?}");
    assert_eq!(two.attributes["gen_ai.response.finish_reasons"], json!(["length", "length"]));
    assert!(!two.attributes.contains_key("lorimer.adapters") && two.attributes["gen_ai.request.n"] == json!(2));
    assert!(three.trace != TRACE && three.parent.is_empty() && three.state.is_empty() && !three.failed, "{three:?}");
    assert_eq!(three.attributes["error.type"], json!("adapter_not_found"));
    {
        let sent = collector.sent.lock().unwrap();
        let (head, body) = &sent[0];
        assert!(
            head.starts_with("post /v1/traces ") && head.contains("content-type: application/x-protobuf"),
            "{head}"
        );
        assert!(head.contains("x-key: secret key"), "{head}");
        let resource = attributes(within(within(body, 1)[0], 1)[0], 1);
        assert_eq!((&resource["service.name"], resource.contains_key("telemetry.sdk.name")), (&json!("test"), true));
    }
    let metrics = server.get("/metrics").body;
    assert!(
        metrics.contains("lorimer_spans_exported_total{model_name=") && metrics.contains("reason=\"queue_full\"} 0"),
        "{metrics}"
    );
    // A client that goes away, and one that is answered just before the end.
    let mut leaving = server.connect();
    let body =
        json!({ "model": "base", "prompt": "up", "max_tokens": 400, "ignore_eos": true, "stream": true }).to_string();
    let (address, length) = (&server.address, body.len());
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    );
    leaving.write_all((head + &body).as_bytes()).unwrap();
    leaving.read_exact(&mut [0; 64]).unwrap();
    drop(leaving);
    let cancelled = collector.spans(4).pop().unwrap();
    assert_eq!(
        (cancelled.name.as_str(), &cancelled.attributes["error.type"]),
        ("text_completion base", &json!("cancelled"))
    );
    ask(&server, &parent, json!({}));
    server.signal("TERM");
    assert!(server.child.wait().unwrap().success());
    assert_eq!(collector.spans(5).len(), 5);
}

/// With a collector that nobody is, requests are answered, the log says it, and the server ends in time; without one, the trace is told all
/// the same. The log tells the trace of each request. To be seen to fail: a log without the trace, or an end that waits for all attempts.
#[test]
fn a_server_without_its_collector_serves() {
    let f = Fixture::new();
    let root = adapters(&f);
    let log = f.path("log");
    for more in [&[][..], &["--otlp-traces-endpoint", "http://127.0.0.1:1"]] {
        let mut server = Server::start_logged(&f, &root, more, &log);
        let traced = ask(&server, &format!("traceparent: 00-{TRACE}-{SPAN}-01\r\n"), json!({}));
        assert_eq!(traced.status, 200, "{}", traced.body);
        assert!(header(&traced, "traceresponse").unwrap().ends_with("-01"));
        let failed = ask(
            &server,
            &format!("traceparent: 00-{TRACE}-{SPAN}-01\r\n"),
            json!({ "lora": [{ "id": "yes-no", "scale": 1e30 }] }),
        );
        assert_eq!(failed.status, 422, "{}", failed.body);
        let begun = Instant::now();
        server.signal("TERM");
        assert!(server.child.wait().unwrap().success() && begun.elapsed() < Duration::from_secs(10));
        let told = std::fs::read_to_string(&log).unwrap();
        let has = |text: &str| told.lines().any(|line| line.contains(text));
        assert!(has(&format!("request{{trace={TRACE}}}: POST /v1/chat/completions: 200 after")), "{told}");
        assert!(has(&format!("ERROR request{{trace={TRACE}}}: request ")), "{told}");
        assert_eq!(told.matches("spans are dropped").count(), more.len() / 2, "{told}");
    }
}

/// What cannot be a collector, and settings of OpenTelemetry that are not offered, are refused before anything is loaded.
#[test]
fn collectors_that_cannot_be_are_refused() {
    let f = Fixture::new();
    for (url, variables, says) in [
        ("127.0.0.1:4317", &[][..], "should be"),
        ("grpc://127.0.0.1:4317", &[], "OTLP over HTTP"),
        (
            "http://127.0.0.1:4317",
            &[("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")],
            "OTEL_EXPORTER_OTLP_PROTOCOL `grpc` is not offered",
        ),
        ("http://127.0.0.1:4318", &[("OTEL_TRACES_SAMPLER", "xray")], "OTEL_TRACES_SAMPLER `xray` is not offered"),
    ] {
        let out = lorimer(&["serve", "--model", &f.model, "--port", "0", "--otlp-traces-endpoint", url])
            .envs(variables.iter().copied())
            .output()
            .unwrap();
        let told = common::text(&out.stderr);
        assert!(out.status.code() == Some(1) && told.starts_with("error: ") && told.contains(says), "{told}");
    }
}
