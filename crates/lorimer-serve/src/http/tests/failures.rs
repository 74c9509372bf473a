//! What is told of requests that fail, and what the others notice of it.

use super::*;

fn completion(prompt: Vec<u32>, stream: bool) -> Value {
    json!({ "prompt": prompt, "max_tokens": 60, "temperature": 0, "ignore_eos": true, "stream": stream })
}

/// The answers of three requests that are under way while another is asked for, and what that one hears.
async fn beside(app: &Arc<App>, asked: Option<&Value>) -> (Vec<Result<Vec<u32>, String>>, Option<(u16, Value)>) {
    let mut tickets: Vec<Ticket> = Vec::new();
    for i in 0..3 {
        let mut ticket = app.worker.submit(plain(vec![30, 40, 50 + i], 200)).await.unwrap();
        assert!(matches!(ticket.next().await, Some(StreamItem::Token(_, None))));
        tickets.push(ticket);
    }
    let heard = match asked {
        Some(asked) => Some(post(app, "/v1/completions", asked).await),
        None => None,
    };
    let mut answers = Vec::new();
    for mut ticket in tickets {
        let mut tokens = Vec::new();
        answers.push(loop {
            match ticket.next().await {
                Some(StreamItem::Token(token, None)) => tokens.push(token.token),
                Some(StreamItem::Token(token, Some(_))) => {
                    tokens.push(token.token);
                    break Ok(tokens);
                }
                other => break Err(format!("{other:?}")),
            }
        });
    }
    (answers, heard)
}

/// Wherever it is that a request makes the server fail: it alone hears of it, with its number and what failed, and the answers of those
/// beside it are what they are without it. To be seen to fail, one each: `Engine::prepare`, `Loop::report` or the figures not caught; requests
/// that the account has lost left alone; `follow` not caught.
#[test]
fn a_request_that_fails_is_told_so_and_costs_no_other() {
    runtime().block_on(async {
        let app = app();
        let (expected, _) = beside(&app, None).await;
        assert!(expected.iter().all(|answer| answer.as_ref().is_ok_and(|tokens| tokens.len() == 199)));
        for fault in [Fault::Submit, Fault::Step, Fault::Later, Fault::Lost, Fault::Report, Fault::Text] {
            let (found, heard) = beside(&app, Some(&completion(fault.prompt(), false))).await;
            assert_eq!(found, expected, "fault {}", fault as u32);
            let heard = heard.unwrap();
            let (status, code, message) = error(&heard);
            assert_eq!((status, code), (500, "computation_failed"), "fault {}: {message}", fault as u32);
            let number = message.strip_prefix("request ").and_then(|rest| rest.split_once(' '));
            assert!(number.is_some_and(|(id, rest)| id.parse::<u64>().is_ok() && rest.contains("a seeded fault")));
        }
        // Whose figures cannot be taken is served as the others, at whatever moment that is.
        let (begun, ask) = (Instant::now(), completion(Fault::Figures.prompt(), false));
        while begun.elapsed() < Duration::from_millis(700) {
            let (found, heard) = beside(&app, Some(&ask)).await;
            assert!(found == expected && heard.unwrap().0 == 200);
        }
        figures(&app, "all have ended", |f| f.engine.running == 0 && f.engine.generated_tokens > 1000).await;
        assert_eq!(app.worker.figures().restarts, 0);
        // The pool is as it was.
        let engine = app.worker.figures().engine;
        assert_eq!(engine.free_pages + engine.cached_pages + engine.adapter_pages, engine.pages, "{engine:?}");
    });
}

/// Where the engine fails at seeing to a failure, all hear that it failed, not that the server stops; and it goes on. To be seen to fail: the
/// thread ending with its first engine.
#[test]
fn an_engine_that_is_made_anew_serves_on() {
    runtime().block_on(async {
        let app = app();
        let (expected, _) = beside(&app, None).await;
        for restarts in 1..3 {
            let (found, heard) = beside(&app, Some(&completion(Fault::Rebuild.prompt(), false))).await;
            // Who had all of his answer by then has it.
            let told =
                |answer: &Result<Vec<u32>, String>| answer.as_ref().is_err_and(|why| why.contains("a seeded fault"));
            assert!(found.iter().zip(&expected).all(|(answer, whole)| told(answer) || answer == whole), "{found:?}");
            let heard = heard.unwrap();
            let (status, code, message) = error(&heard);
            assert_eq!((status, code), (500, "computation_failed"), "{message}");
            assert!(message.starts_with("request ") && message.contains("made anew"), "{message}");
            assert_eq!(app.worker.figures().restarts, restarts);
            assert_eq!(get(&app, "/health").await.0, 200);
            assert_eq!(beside(&app, None).await.0, expected);
        }
    });
}

/// An engine that cannot be made anew is told by every answer and by `/health`; nothing says that the server is shutting down. To be seen to
/// fail: a thread that ends and says nothing.
#[test]
fn an_engine_that_has_ended_is_told() {
    runtime().block_on(async {
        let base = base("tiny-llama");
        let settings = EngineSettings { pool_bytes: 1, ..Default::default() };
        let worker = Worker::start_unchecked(base.clone(), None, settings).unwrap();
        let app = App::new(base, "tiny".into(), None, worker, Keys::default(), true);
        let ask = completion(vec![3, 4, 5], false);
        for _ in 0..50 {
            let heard = post(&app, "/v1/completions", &ask).await;
            let (status, code, message) = error(&heard);
            assert_eq!((status, code), (500, "engine_failed"), "{message}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let heard = post(&app, "/v1/completions", &ask).await;
        assert!(error(&heard).2.starts_with("the engine cannot be started"), "{heard:?}");
        let health = get(&app, "/health").await;
        assert_eq!((error(&health).0, error(&health).1), (503, "engine_failed"));
        assert!(get(&app, "/v1/state").await.1["problems"][0].as_str().unwrap().contains("cannot be started"));
    });
}

fn events(body: &str) -> Vec<&str> {
    body.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect()
}

/// What fails before there is anything to stream has a status of its own; what fails later is an event, the last before the end.
#[test]
fn a_stream_that_fails_tells_it_in_an_event() {
    runtime().block_on(async {
        let app = app();
        // A token that is a piece of text by itself.
        let letter = app.base.text.encode("a", false).unwrap().ids;
        let at_once = post(&app, "/v1/completions", &completion(Fault::Step.prompt(), true)).await;
        assert_eq!((error(&at_once).0, error(&at_once).1), (500, "computation_failed"));
        for path in ["/v1/completions", "/v1/chat/completions"] {
            // A chat's prompt is the template's, which no fault begins: its answer is given up in another way (below).
            if path == "/v1/completions" {
                let ask = completion(Fault::Later.prompt(), true);
                let (status, body) = text(post_from(&app, ("127.0.0.1", ""), path, &ask).await).await;
                let events = events(&body);
                let [pieces @ .., error, "[DONE]"] = &events[..] else { panic!("{body}") };
                assert!(
                    status == 200 && !pieces.is_empty() && pieces.iter().all(|e| e.contains("\"choices\"")),
                    "{body}"
                );
                let error: Value = serde_json::from_str(error).unwrap();
                assert_eq!(error["error"]["code"], "computation_failed", "{error}");
                assert!(error["error"]["message"].as_str().unwrap().contains("a seeded fault"), "{error}");
            }
            // A client that takes nothing for so long that the engine gives its answer up.
            // The template makes little of it, so that there is room for a long answer.
            let message = json!([{ "role": "system", "content": "x" }]);
            let mut ask = json!({ "allowed_token_ids": letter, "ignore_eos": true, "stream": true });
            match path {
                "/v1/completions" => ask["prompt"] = json!("up 3"),
                _ => ask["messages"] = message,
            }
            let before = app.worker.figures().cancelled;
            let answer = post_from(&app, ("127.0.0.1", ""), path, &ask).await;
            figures(&app, "it is given up", |f| f.cancelled > before).await;
            let (status, body) = text(answer).await;
            let events = events(&body);
            let [pieces @ .., error, "[DONE]"] = &events[..] else { panic!("{body}") };
            assert!(status == 200 && !pieces.is_empty() && pieces.len() < 400, "{body}");
            let error: Value = serde_json::from_str(error).unwrap();
            assert_eq!(error["error"]["code"], "client_too_slow", "{error}");
        }
    });
}
