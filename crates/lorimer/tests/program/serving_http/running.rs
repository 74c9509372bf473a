//! A running server: stopping, bounds of what it holds, what it says of what it cannot compute, and its figures.

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

/// Many streams under way and some that wait when the server is told to stop: all come to their ends, and nothing new is taken.
#[test]
fn a_server_with_many_streams_hears_that_it_is_to_stop() {
    const STREAMS: usize = 100;
    let f = Fixture::new();
    // Few at a time, so that it takes a while however fast the machine is.
    let mut server = Server::start(&f, &adapters(&f), &["--max-running", "4"]);
    let body =
        json!({ "model": "base", "prompt": "up", "max_tokens": 250, "ignore_eos": true, "stream": true, "temperature": 0 }).to_string();
    let host = server.address.clone();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut streams: Vec<TcpStream> = (0..STREAMS).map(|_| server.connect()).collect();
    streams.iter_mut().for_each(|stream| stream.write_all(head.as_bytes()).unwrap());
    // Each is heard once it has an answer or waits for one.
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let figures = server.get("/v1/state").json()["figures"].clone();
        let count = |n: &Value| n.as_u64().unwrap() as usize;
        let there = count(&figures["engine"]["running"]) + count(&figures["engine"]["waiting"]);
        if there + count(&figures["answered"]) >= STREAMS && there > 0 {
            break;
        }
        assert!(Instant::now() < deadline, "{figures}");
        std::thread::sleep(Duration::from_millis(20));
    }
    server.signal("TERM");
    let mut whole = 0;
    for mut stream in streams {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        whole += usize::from(String::from_utf8_lossy(&all).contains("data: [DONE]"));
    }
    assert_eq!(whole, STREAMS, "answers were cut");
    assert!(server.child.wait().unwrap().success());
    assert!(TcpStream::connect(&host).is_err());
}

/// A scale at which nothing is a number any more is refused by name and number, streamed or not, and disturbs nobody.
#[test]
fn what_is_not_finite_is_refused_by_name() {
    let f = Fixture::new();
    let root = adapters(&f);
    let server = Server::start(&f, &root, &[]);
    for stream in [false, true] {
        let refused = server.chat(json!({ "lora": [{ "id": "yes-no", "scale": 1e30 }], "stream": stream }));
        assert_eq!((refused.status, refused.code().as_str()), (422, "not_finite"), "{}", refused.body);
        let error = refused.json()["error"]["message"].as_str().unwrap().to_string();
        let number = error.strip_prefix("request ").and_then(|rest| rest.split_once(' '));
        assert!(number.is_some_and(|(id, _)| id.parse::<u64>().is_ok()), "{error}");
        assert!(error.contains("could not be computed") && error.contains("`yes-no` at weight 1"), "{error}");
        assert_eq!(server.answer(json!({ "model": "yes-no" })), "yes");
    }
}

/// 512 bodies of 8 MB, of each the first megabyte, that never end: those that the server holds at a time are bounded, the others are refused, and
/// their room is given back when their senders are gone. To be seen to fail: room without bound (`LARGE_BODIES`), with which the server holds
/// all 512 MB.
#[cfg(target_os = "linux")]
#[test]
fn aborted_large_bodies_hold_no_memory() {
    const SENT: usize = 1 << 20;
    let f = Fixture::new();
    let server = bare(&f);
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        server.address,
        8 << 20
    );
    let peak = |child: &Child| -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
    };
    server.answer(json!({}));
    let before = peak(&server.child);
    let body = vec![b' '; SENT];
    // Who is refused may be cut off while he writes.
    let mut all: Vec<TcpStream> = (0..512).map(|_| server.connect()).collect();
    for stream in &mut all {
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
    }
    // Part of what was sent may be in the sockets' buffers for a moment. What the server has taken stays with it, or is answered.
    std::thread::sleep(Duration::from_secs(1));
    all.retain_mut(|stream| {
        stream.set_nonblocking(true).unwrap();
        let mut answer = [0; 512];
        match stream.read(&mut answer) {
            Ok(n) => {
                let answer = String::from_utf8_lossy(&answer[..n]);
                assert!(n == 0 || answer.starts_with("HTTP/1.1 503") && answer.contains("overloaded"), "{answer}");
                false
            }
            Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
        }
    });
    assert!(!all.is_empty() && all.len() * (SENT - (64 << 10)) <= 32 << 20, "{} of 512 are held", all.len());
    // Small requests are answered while they hold on, and large ones once they are gone.
    server.answer(json!({}));
    let large = json!({ "messages": [{ "role": "user", "content": " ".repeat(4 << 20) }] });
    drop(all);
    let deadline = Instant::now() + Duration::from_secs(20);
    while server.post("/v1/chat/completions", &large).code() == "overloaded" {
        assert!(Instant::now() < deadline, "room of bodies whose senders are gone is not given back");
        std::thread::sleep(Duration::from_millis(100));
    }
    // Room of 32 MB, and of each body the part that is always read, with what the allocator keeps beside that: far from all that was sent.
    let grown = peak(&server.child) - before;
    assert!(grown < 512 * SENT / 2, "memory grew by {} MB", grown >> 20);
}

/// Products in whole numbers answer on every processor, in one way. To be seen to fail: `serve` that refuses int8 at some level, or the portable form
/// with its halves of a panel exchanged.
#[test]
fn int8_is_served_at_every_level() {
    let f = Fixture::new();
    let root = f.path("none");
    std::fs::create_dir(&root).unwrap();
    let answers = ["plain", "avx2", "avxvnni", "avx512", "vnni"].map(|level| {
        let arguments = ["serve", "--model", &f.model, "--adapters", &root, "--port", "0", "--json", "-q"];
        let mut command = lorimer(&[&arguments[..], &["--pool", "4MB", "--dtype", "int8"]].concat());
        command.env("LORIMER_CPU", level);
        let answer = Server::started(command).answer(json!({ "ignore_eos": true }));
        assert!(!answer.is_empty(), "{level}");
        answer
    });
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
}
