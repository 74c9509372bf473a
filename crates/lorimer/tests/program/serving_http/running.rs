//! Stopping, and the figures of a running server.

use super::*;

#[test]
fn a_server_that_is_told_to_stop_ends_what_it_began() {
    let f = Fixture::new();
    let root = adapters(&f);
    let mut server = Server::start(&f, &root, &[]);
    let mut stream = server.connect();
    let body =
        json!({ "model": "base", "prompt": "up", "max_tokens": 100, "ignore_eos": true, "stream": true }).to_string();
    let host = server.address.clone();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    let mut first = [0; 32];
    let n = stream.read(&mut first).unwrap();
    server.signal("TERM");
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    let whole = [&first[..n], &rest].concat();
    assert!(String::from_utf8_lossy(&whole).contains("data: [DONE]"), "the answer was cut");
    assert!(server.child.wait().unwrap().success());
    assert!(TcpStream::connect(&host).is_err());
}

/// What is counted as what: an answer that a stop text ends is an answer, and the bound on adapters is that of the batch.
#[test]
fn figures_are_what_they_say() {
    let f = Fixture::new();
    let root = adapters(&f);
    let server = Server::start(&f, &root, &["--max-running", "7"]);
    let ask = json!({ "model": "base", "prompt": "up 3", "temperature": 0, "max_tokens": 300, "ignore_eos": true });
    let whole = server.post("/v1/completions", &ask).json()["choices"][0]["text"].as_str().unwrap().to_string();
    let stop: String = whole.chars().skip(3).take(2).collect();
    for stream in [false, true] {
        let mut ask = ask.clone();
        (ask["stop"], ask["stream"]) = (json!([stop]), json!(stream));
        let stopped = server.post("/v1/completions", &ask);
        assert!(stopped.status == 200 && stopped.body.contains("\"stop\""), "{}", stopped.body);
    }
    let deadline = Instant::now() + Duration::from_secs(20);
    let figures = loop {
        let figures = server.get("/v1/state").json()["figures"].clone();
        if figures["engine"]["pages"] != 0 && figures["engine"]["running"] == 0 && figures["answered"] == 3 {
            break figures;
        }
        assert!(Instant::now() < deadline, "{figures}");
        std::thread::sleep(Duration::from_millis(100));
    };
    assert_eq!((&figures["cancelled"], &figures["failed"]), (&json!(0), &json!(0)), "{figures}");
    let observed: u64 = figures["whole"]["counts"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).sum();
    assert_eq!(observed, 3, "{figures}");
    let metrics = server.get("/metrics").body;
    assert!(metrics.contains("max_lora=\"7\""), "{metrics}");
    // Blocks that are kept for prompts that begin alike are not in use.
    assert!(figures["engine"]["cached_pages"].as_u64().unwrap() > 0, "{figures}");
    let usage = metrics.lines().find(|l| l.starts_with("vllm:kv_cache_usage_perc{")).unwrap();
    assert!(usage.ends_with("} 0"), "{usage}");
}
