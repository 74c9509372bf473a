//! Bounds of connections, bodies and texts, and what is whose.

use std::net::SocketAddr;
use std::sync::Mutex;

use super::*;

/// A server on a port of this machine, until the sender is used.
async fn serving(bounds: Bounds, app: Arc<App>) -> (SocketAddr, tokio::sync::oneshot::Sender<()>, Serving) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let stopped = async move { _ = stopped.await };
    (address, stop, tokio::spawn(serve_within(bounds, (listener, None), app, stopped, Duration::from_millis(200))))
}

type Serving = tokio::task::JoinHandle<std::io::Result<()>>;

#[test]
fn the_end_is_heard_while_every_connection_is_taken() {
    runtime().block_on(async {
        let (address, stop, server) = serving(Bounds { connections: 2, ..BOUNDS }, app()).await;
        let mut taken = Vec::new();
        for _ in 0..4 {
            taken.push(TcpStream::connect(address).await.unwrap());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        stop.send(()).unwrap();
        tokio::time::timeout(Duration::from_secs(5), server).await.expect("it ends").unwrap().unwrap();
    });
}

/// A client that asks for much and takes nothing of it does not keep its connection, which others wait for. To be seen to fail: connections that
/// are served without [`Timed`].
#[test]
fn a_client_that_takes_nothing_loses_its_connection() {
    runtime().block_on(async {
        let bounds = Bounds { connections: 1, patience: Duration::from_millis(300) };
        let (address, _stop, _server) = serving(bounds, app()).await;
        let ask = "GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n";
        let mut silent = TcpStream::connect(address).await.unwrap();
        // More than the buffers of both ends hold.
        assert!(document().len() > 20_000);
        silent.write_all(ask.repeat(1500).as_bytes()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        let mut other = TcpStream::connect(address).await.unwrap();
        other.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        let heard = tokio::time::timeout(Duration::from_secs(20), other.read_to_string(&mut answer)).await;
        heard.expect("the connection is given up").unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        drop(silent);
    });
}

/// Whoever does not take his answer loses it, and the engine keeps no more of it than its queue.
#[test]
fn an_answer_that_nobody_takes_is_given_up() {
    runtime().block_on(async {
        let app = app();
        let mut ticket = app.worker.submit(plain(vec![3, 4, 5], 500)).await.unwrap();
        figures(&app, "it is given up", |f| f.cancelled > 0).await;
        let mut items = Vec::new();
        while let Some(one) = ticket.next().await {
            items.push(one);
        }
        assert!(items.len() < 500 && items.last() == Some(&StreamItem::TooSlow), "{}", items.len());
    });
}

/// A client has its turn whatever another asks for under however many names: they are told apart by key, and by address. To be seen to fail: a
/// client that is the same for all requests, or known by the key alone, or by the address alone.
#[test]
fn clients_are_told_apart_by_key_and_by_address() {
    for (greedy, other) in [(("10.0.0.1", "a"), ("10.0.0.1", "b")), (("10.0.0.1", "a"), ("10.0.0.2", "a"))] {
        runtime().block_on(async {
            let keys = Keys { api: Some("a".into()), admin: Some("b".into()) };
            let app = app_with(Policy { max_running: 1, ..Default::default() }, keys);
            let ended = Arc::new(Mutex::new(Vec::new()));
            let ask = |who: (&'static str, &'static str), user: String| {
                let (app, ended) = (app.clone(), ended.clone());
                tokio::spawn(async move {
                    let ask = json!({ "prompt": "up 3", "max_tokens": 240, "ignore_eos": true, "user": user });
                    let (status, body) = text(post_from(&app, who, "/v1/completions", &ask).await).await;
                    assert_eq!(status, 200, "{body}");
                    ended.lock().unwrap().push(user);
                })
            };
            let many: Vec<_> = (0..48).map(|i| ask(greedy, format!("user {i:02}"))).collect();
            figures(&app, "many wait", |f| f.engine.waiting >= 24).await;
            ask(other, "z".into()).await.unwrap();
            let before = ended.lock().unwrap().len() - 1;
            for one in many {
                one.await.unwrap();
            }
            // The one that ran, those that ran while the figures were looked at, and its own turn.
            assert!(before < 40, "{greedy:?} and {other:?}: {before} of 48 came first: {:?}", ended.lock().unwrap());
        });
    }
}

/// What cannot fit, whatever its tokens are, is refused by its bytes before it is encoded, in every call that takes texts. To be seen to fail:
/// `App::fits` left out of any of them.
#[test]
fn texts_are_bounded_before_they_are_encoded() {
    runtime().block_on(async {
        let app = app();
        let long = "a ".repeat(app.longest / 2 + 1);
        let messages = json!([{ "role": "user", "content": long }]);
        let parts = json!([{ "role": "user", "content": [{ "type": "text", "text": long }] }]);
        for (path, ask, field) in [
            ("/v1/completions", json!({ "prompt": long }), "prompt"),
            ("/v1/completions", json!({ "prompt": ["up", long] }), "prompt"),
            ("/v1/chat/completions", json!({ "messages": messages }), "messages"),
            ("/v1/chat/completions", json!({ "messages": parts }), "messages"),
            (
                "/v1/chat/completions",
                json!({ "messages": [{ "role": "user", "content": "up" }], "tools": [{ "type": "function", "function": { "name": "f", "description": long } }] }),
                "messages",
            ),
        ] {
            let refused = post(&app, path, &ask).await;
            assert_eq!((error(&refused).0, refused.1["error"]["param"].as_str()), (400, Some(field)), "{path}");
            assert!(error(&refused).2.starts_with("a text of "), "{path}: {}", error(&refused).2);
        }
        let base = base("tiny-bert");
        let options = EmbedOptions::of_folder(&base.path, base.model().shape().max_positions).unwrap();
        let worker = Worker::start(base.clone(), EngineSettings { pool_bytes: 1 << 20, ..Default::default() }).unwrap();
        let app = App::embedding((base, options), "tiny".into(), None, worker, Keys::default(), true);
        let long = "a ".repeat(app.longest / 2 + 1);
        for input in [json!(long), json!(["a", long])] {
            let refused = post(&app, "/v1/embeddings", &json!({ "input": input })).await;
            assert_eq!((error(&refused).0, refused.1["error"]["param"].as_str()), (400, Some("input")));
            assert!(error(&refused).2.starts_with("a text of "), "{}", error(&refused).2);
        }
        // Of a text that is to be shortened only the beginning is encoded, which gives the vector of the whole.
        let vector = |text: &str, n: i64| {
            let (app, ask) = (app.clone(), json!({ "input": text, "truncate_prompt_tokens": n }));
            async move { post(&app, "/v1/embeddings", &ask).await }
        };
        let (whole, cut) = (vector(&long, 9).await, vector(&long[..200], 9).await);
        assert_eq!((whole.0, &whole.1["data"]), (200, &cut.1["data"]), "{}", whole.1);
        // Nothing of a beginning without tokens is taken for the text.
        let refused = vector(&format!("{}a", " ".repeat(app.longest)), -1).await;
        assert!(refused.0 == 400 && error(&refused).2.starts_with("a text of "), "{}", refused.1);
    });
}

/// Numbers take many times their bytes once they are read: a body of too many is refused before that. To be seen to fail: the bound left out.
#[test]
fn values_of_a_body_are_bounded_before_they_are_read() {
    runtime().block_on(async {
        let app = app();
        let most = app.base.model().shape().cached_positions() * request::MAX_CHOICES + room::SMALL_BODY;
        for (n, refused) in [(most - 10, false), (most + 10, true)] {
            let heard = post(&app, "/v1/completions", &json!({ "prompt": vec![3; n] })).await;
            assert_eq!(heard.0, 400);
            assert_eq!(error(&heard).2.starts_with("the body holds "), refused, "{n}: {}", error(&heard).2);
        }
        // As deep as they are wide.
        let deep = format!("{{\"prompt\": {}", "[".repeat(most + 10));
        let request = Request::builder().method("POST").uri("/v1/completions");
        let request = request.header(header::CONTENT_TYPE, "application/json").body(Body::from(deep)).unwrap();
        let (status, body) = text(router(app.clone()).oneshot(request).await.unwrap()).await;
        assert!(status == 400 && body.contains("the body holds"), "{body}");
    });
}
