//! The whole server, as its clients use and misuse it, on a tiny model.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::{self, Fixture, error, json as run, lorimer};

mod adapters;
mod answers;
mod calls;
mod draft;
mod from_hub;
mod kv_cache;
mod requests;
mod running;
mod sampling;
mod traces;

/// A running server.
struct Server {
    child: Child,
    address: String,
    _out: BufReader<ChildStdout>,
}

/// An answer: status, head, body.
struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }
    fn code(&self) -> String {
        self.json()["error"]["code"].as_str().unwrap_or_default().to_string()
    }
}

impl Server {
    fn start(f: &Fixture, root: &str, more: &[&str]) -> Self {
        Self::start_with(f, root, more, &[])
    }

    /// With variables of the environment.
    fn start_with(f: &Fixture, root: &str, more: &[&str], variables: &[(&str, &str)]) -> Self {
        let mut command = Self::command(f, root, more);
        command.arg("-q").envs(variables.iter().copied());
        Self::started(command)
    }

    /// With all that the log tells of requests in a file.
    fn start_logged(f: &Fixture, root: &str, more: &[&str], log: &str) -> Self {
        let mut command = Self::command(f, root, more);
        command.env("LORIMER_LOG", "lorimer=debug").stderr(std::fs::File::create(log).unwrap());
        Self::started(command)
    }

    fn command(f: &Fixture, root: &str, more: &[&str]) -> Command {
        let base = ["serve", "--model", &f.model, "--adapters", root, "--port", "0", "--json"];
        let pool: &[&str] = if more.contains(&"--pool") { &[] } else { &["--pool", "4MB"] };
        lorimer(&[&base, pool, more].concat())
    }

    fn started(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        let url: Value = serde_json::from_str(&line).expect("the server says where it is");
        let address = url["url"].as_str().unwrap().strip_prefix("http://").unwrap().to_string();
        Self { child, address, _out: out }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    /// Sends bytes as they are and reads to the end of the connection.
    fn raw(&self, bytes: &[u8]) -> Answer {
        let mut stream = self.connect();
        // A server that has read enough may close before all is written.
        let _ = stream.write_all(bytes);
        let mut all = Vec::new();
        let _ = stream.read_to_end(&mut all);
        let text = String::from_utf8_lossy(&all).into_owned();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        Answer { status, head: head.to_lowercase(), body: dechunked(head, body) }
    }

    fn request(&self, method: &str, path: &str, headers: &str, body: &str) -> Answer {
        let length = body.len();
        let address = &self.address;
        self.raw(
            format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n{body}").as_bytes(),
        )
    }

    fn get(&self, path: &str) -> Answer {
        self.request("GET", path, "", "")
    }

    fn send(&self, method: &str, path: &str, body: &Value) -> Answer {
        self.request(method, path, "Content-Type: application/json\r\n", &body.to_string())
    }

    fn post(&self, path: &str, body: &Value) -> Answer {
        self.send("POST", path, body)
    }

    fn chat(&self, more: Value) -> Answer {
        let mut body =
            json!({ "temperature": 0, "max_tokens": 8, "messages": [{ "role": "user", "content": "up 3" }] });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.post("/v1/chat/completions", &body)
    }

    fn answer(&self, more: Value) -> String {
        let answer = self.chat(more);
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()["choices"][0]["message"]["content"].as_str().unwrap().to_string()
    }

    fn signal(&self, name: &str) {
        let status = Command::new("kill").arg(format!("-{name}")).arg(self.child.id().to_string()).status();
        assert!(status.unwrap().success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A body that came in chunks.
fn dechunked(head: &str, body: &str) -> String {
    if !head.to_lowercase().contains("transfer-encoding: chunked") {
        return body.to_string();
    }
    let (mut rest, mut out) = (body, String::new());
    while let Some((length, after)) = rest.split_once("\r\n") {
        let length = usize::from_str_radix(length.trim(), 16).unwrap_or(0);
        if length == 0 || after.len() < length {
            break;
        }
        out.push_str(&after[..length]);
        rest = after[length..].trim_start_matches("\r\n");
    }
    out
}

/// The events of a stream.
fn events(body: &str) -> Vec<Value> {
    let data = body.split("\n\n").filter_map(|e| e.strip_prefix("data: ")).filter(|e| *e != "[DONE]");
    data.map(|e| serde_json::from_str(e).unwrap()).collect()
}

/// Two adapters in `root`: one that has learnt to say yes and no, and one of another method that says whatever it says.
fn adapters(f: &Fixture) -> String {
    let root = f.path("adapters");
    let (one, two) = (format!("{root}/yes-no"), format!("{root}/tenant/bone"));
    run(&f.train(&one, &["--max-steps", "60"]));
    run(&f.train(&two, &["--max-steps", "20", "--method", "bone", "--rank", "4"]));
    root
}

/// A server of the bare base.
fn bare(f: &Fixture) -> Server {
    let root = f.path("none");
    std::fs::create_dir(&root).unwrap();
    Server::start(f, &root, &[])
}

/// `a` with the fields of `b` in their places.
fn with(a: &Value, b: Value) -> Value {
    let mut all = a.clone();
    all.as_object_mut().unwrap().extend(b.as_object().unwrap().clone());
    all
}
