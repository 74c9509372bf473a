//! A stand-in for an S3-compatible object store: HEAD, GET, conditional PUT and listings of one bucket, and the ways in which a store fails.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What it does with a request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mood {
    Answers,
    /// Answers after a while.
    Slow(Duration),
    /// Breaks the connection.
    Down,
    /// Reads, and never answers.
    Swallows,
    /// Answers reading, and refuses writing.
    ReadOnly,
}

pub struct S3 {
    pub endpoint: String,
    shared: Arc<Mutex<Shared>>,
}

struct Shared {
    mood: Mood,
    /// Contents and tags by key.
    objects: BTreeMap<String, (Vec<u8>, String)>,
    next: u64,
    /// Heads of requests that were answered.
    answered: Vec<String>,
}

/// A request: the first line's method and target, the head as it came, the body.
type Asked = (String, String, String, Vec<u8>);

impl S3 {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let objects = BTreeMap::new();
        let shared = Shared { mood: Mood::Answers, objects, next: 0, answered: vec![] };
        let shared = Arc::new(Mutex::new(shared));
        let own = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = own.clone();
                std::thread::spawn(move || _ = serve(stream, &shared));
            }
        });
        Self { endpoint, shared }
    }

    pub fn set(&self, mood: Mood) {
        self.shared.lock().unwrap().mood = mood;
    }

    pub fn put(&self, key: &str, bytes: Vec<u8>) {
        let mut shared = self.shared.lock().unwrap();
        shared.next += 1;
        let tag = format!("\"{}\"", shared.next);
        shared.objects.insert(key.into(), (bytes, tag));
    }

    pub fn get(&self, key: &str) -> Option<Vec<u8>> {
        self.shared.lock().unwrap().objects.get(key).map(|(bytes, _)| bytes.clone())
    }

    /// Heads of the requests that were answered since the last call.
    pub fn answered(&self) -> Vec<String> {
        std::mem::take(&mut self.shared.lock().unwrap().answered)
    }
}

fn read(reader: &mut BufReader<TcpStream>) -> Option<Asked> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    let mut first = head.split(' ');
    let (method, target) = (first.next()?.to_string(), first.next()?.to_string());
    let mut body = vec![0; header(&head, "content-length").and_then(|n| n.parse().ok()).unwrap_or(0)];
    reader.read_exact(&mut body).ok()?;
    Some((method, target, head, body))
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|l| l.split_once(": ").filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.trim()))
}

fn serve(stream: TcpStream, shared: &Mutex<Shared>) -> std::io::Result<()> {
    let mut out = stream.try_clone()?;
    let mut reader = BufReader::new(stream);
    while let Some(asked) = read(&mut reader) {
        let mood = shared.lock().unwrap().mood;
        match mood {
            Mood::Down => return Ok(()),
            Mood::Swallows => loop {
                std::thread::sleep(Duration::from_secs(3600));
            },
            Mood::Slow(time) => std::thread::sleep(time),
            Mood::Answers | Mood::ReadOnly => {}
        }
        let (status, headers, body) = answer(&mut shared.lock().unwrap(), &asked);
        let length = body.len();
        out.write_all(format!("HTTP/1.1 {status} x\r\n{headers}Content-Length: {length}\r\n\r\n").as_bytes())?;
        // An answer to HEAD has the length of a body and none.
        if asked.0 != "HEAD" {
            out.write_all(&body)?;
        }
    }
    Ok(())
}

fn answer(shared: &mut Shared, (method, target, head, body): &Asked) -> (u16, String, Vec<u8>) {
    shared.answered.push(head.clone());
    let error = |status: u16, code: &str| {
        (status, String::new(), format!("<Error><Code>{code}</Code><Message>{code}</Message></Error>").into_bytes())
    };
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    // /bucket/key
    let key = path.trim_start_matches('/').split_once('/').map_or("", |(_, key)| key).replace("%20", " ");
    if query.contains("list-type=2") {
        let prefix = query.split('&').find_map(|p| p.strip_prefix("prefix=")).unwrap_or("").replace("%2F", "/");
        let mut xml = String::from("<ListBucketResult><IsTruncated>false</IsTruncated>");
        for (key, (bytes, tag)) in shared.objects.iter().filter(|(key, _)| key.starts_with(&prefix)) {
            let size = bytes.len();
            xml += &format!(
                "<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>{tag}</ETag><Size>{size}</Size></Contents>"
            );
        }
        return (200, String::new(), (xml + "</ListBucketResult>").into_bytes());
    }
    let there = shared.objects.get(&key).cloned();
    match (method.as_str(), there) {
        ("PUT", _) if shared.mood == Mood::ReadOnly => error(403, "AccessDenied"),
        ("PUT", there) => {
            let tag = there.map(|(_, tag)| tag);
            if header(head, "if-none-match") == Some("*") && tag.is_some() {
                return error(412, "PreconditionFailed");
            }
            if header(head, "if-match").is_some_and(|wanted| tag.as_deref() != Some(wanted)) {
                return error(412, "PreconditionFailed");
            }
            shared.next += 1;
            let tag = format!("\"{}\"", shared.next);
            shared.objects.insert(key, (body.clone(), tag.clone()));
            (200, format!("ETag: {tag}\r\n"), vec![])
        }
        (_, None) => error(404, "NoSuchKey"),
        (_, Some((bytes, tag))) => {
            let headers = format!("ETag: {tag}\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n");
            (200, headers, bytes)
        }
    }
}
