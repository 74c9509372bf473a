//! Answers: those of the command line, streamed, with log-probabilities, of conversations.

use super::*;

#[test]
fn answers_are_those_of_the_command_line_however_the_adapter_is_named() {
    let f = Fixture::new();
    let root = adapters(&f);
    let server = Server::start(&f, &root, &[]);
    let models = server.get("/v1/models").json();
    let ids: Vec<&str> = models["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    let base = ids[0];
    assert_eq!(ids[1..], ["tenant/bone", "yes-no"]);
    assert_eq!(server.get("/v1/models/tenant/bone").json()["parent"], base);
    assert_eq!(server.get("/v1/models/none").status, 404);
    let expected = |adapter: &str| {
        let folder = format!("{root}/{adapter}");
        let mut all = vec!["generate", "--model", &f.model, "--prompt", "up 3", "--max-tokens", "8"];
        if !adapter.is_empty() {
            all.extend(["--adapter", &folder]);
        }
        run(&all)["text"].as_str().unwrap().to_string()
    };
    let yes = expected("yes-no");
    assert_eq!(yes, "yes");
    for more in [
        json!({ "model": "yes-no" }),
        json!({ "model": format!("{base}:yes-no") }),
        json!({ "model": format!("{base}::yes-no") }),
        json!({ "model": base, "adapter_id": "yes-no" }),
        json!({ "adapter": "yes-no" }),
        json!({ "model": "base", "lora": [{ "id": "yes-no" }] }),
        json!({ "lora": [{ "id": "yes-no", "scale": 1.0 }] }),
    ] {
        assert_eq!(server.answer(more.clone()), yes, "{more}");
    }
    assert_eq!(server.answer(json!({ "model": base })), expected(""));
    assert_eq!(server.answer(json!({})), expected(""));
    assert_eq!(server.answer(json!({ "model": "tenant/bone" })), expected("tenant/bone"));
    let sum = format!("{root}/yes-no=0.5");
    let half = run(&["generate", "--model", &f.model, "--prompt", "up 3", "--max-tokens", "8", "--adapter", &sum]);
    assert_eq!(server.answer(json!({ "lora": [{ "id": "yes-no", "scale": 0.5 }] })), half["text"].as_str().unwrap());
    let two = json!({ "lora": [{ "id": "yes-no", "scale": 0.7 }, { "id": "tenant/bone", "scale": 0.3 }] });
    assert_eq!(server.chat(two).status, 200);
}

#[test]
fn streams_choices_log_probabilities_stops_and_usage() {
    let f = Fixture::new();
    let root = adapters(&f);
    let server = Server::start(&f, &root, &[]);
    let whole = server.chat(json!({ "model": "base", "logprobs": true, "top_logprobs": 3 })).json();
    let choice = &whole["choices"][0];
    let text = choice["message"]["content"].as_str().unwrap();
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(whole["usage"]["completion_tokens"], 8);
    let told = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(told.len(), 8);
    for token in told {
        // Greedy: the token is the likeliest one.
        assert_eq!(token["logprob"], token["top_logprobs"][0]["logprob"]);
        assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 3);
        assert!(token["logprob"].as_f64().unwrap() < 0.0);
    }
    let streamed = server.chat(json!({ "model": "base", "stream": true, "stream_options": { "include_usage": true } }));
    assert!(streamed.head.contains("text/event-stream"), "{}", streamed.head);
    assert!(streamed.body.trim_end().ends_with("data: [DONE]"));
    let events = events(&streamed.body);
    let pieces: String = events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(pieces, text);
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(events.last().unwrap()["usage"], whole["usage"]);
    assert!(events.iter().any(|e| e["choices"][0]["finish_reason"] == "length"));
    // Drawn with a seed: several choices differ, and come again with the seed.
    let drawn = |seed: i64| {
        let body = server.chat(json!({ "model": "base", "temperature": 1.5, "n": 3, "seed": seed })).json();
        let texts =
            body["choices"].as_array().unwrap().iter().map(|c| c["message"]["content"].as_str().unwrap().to_string());
        texts.collect::<Vec<_>>()
    };
    let first = drawn(3);
    assert_eq!(first.len(), 3);
    assert!(first[0] != first[1] || first[1] != first[2], "{first:?}");
    assert_eq!(drawn(3), first);
    assert_ne!(drawn(4), first);
    // Completions: texts, token ids, several prompts, echo, a stop text.
    let complete = |more: Value| {
        let mut body = json!({ "model": "base", "temperature": 0, "max_tokens": 6 });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = server.post("/v1/completions", &body);
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()
    };
    let plain = complete(json!({ "prompt": "up 3", "logprobs": 2 }));
    let own = plain["choices"][0]["text"].as_str().unwrap().to_string();
    assert_eq!(plain["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap().len(), 6);
    // Where each token begins in the text, after the prompt if that is echoed.
    let offsets = |answer: &Value, before: usize| {
        let told = &answer["choices"][0]["logprobs"];
        let mut at = before;
        for (token, offset) in told["tokens"].as_array().unwrap().iter().zip(told["text_offset"].as_array().unwrap()) {
            assert_eq!(*offset, json!(at), "{told}");
            let token = token.as_str().unwrap();
            // A byte that is no letter is one character of replacement.
            at += if token.starts_with("bytes:") { 1 } else { token.chars().count() };
        }
    };
    offsets(&plain, 0);
    offsets(&complete(json!({ "prompt": "up 3", "logprobs": 0, "echo": true })), 0);
    let both = complete(json!({ "prompt": ["up 3", "down 3"], "echo": true }));
    assert_eq!(both["choices"][0]["text"], format!("up 3{own}"));
    assert_eq!(both["choices"].as_array().unwrap().len(), 2);
    let ids = complete(json!({ "prompt": [[1, 5, 7], [2, 3]] }));
    assert_eq!((&ids["usage"]["prompt_tokens"], &ids["usage"]["completion_tokens"]), (&json!(5), &json!(12)));
    let at: Vec<(usize, char)> = own.char_indices().collect();
    if let [.., (start, c), _] = at[..] {
        let stopped = complete(json!({ "prompt": "up 3", "stop": [c.to_string()] }));
        let stopped = stopped["choices"][0]["text"].as_str().unwrap();
        assert!(start >= stopped.len() && own.starts_with(stopped) && !stopped.contains(c), "{stopped:?} of {own:?}");
    }
    let metrics = server.get("/metrics");
    for name in [
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:lora_requests_info",
        "vllm:time_to_first_token_seconds_bucket",
        "lorimer_pool_pages",
    ] {
        assert!(metrics.body.contains(name), "{name}");
    }
    assert!(server.get("/").body.contains("<title>Lorimer</title>"));
}

/// `base` and the short name mean the base unless an adapter has that name: then which is meant has to be said.
#[test]
fn a_name_does_not_stand_for_the_base_and_an_adapter() {
    let f = Fixture::new();
    let root = f.path("adapters");
    run(&f.train(&format!("{root}/base"), &["--max-steps", "60"]));
    let server = Server::start(&f, &root, &[]);
    let own = server.get("/v1/models").json()["data"][0]["id"].as_str().unwrap().to_string();
    let refused = server.chat(json!({ "model": "base" }));
    assert_eq!((refused.status, refused.json()["error"]["param"].as_str()), (400, Some("model")), "{}", refused.body);
    let bare = server.answer(json!({ "model": own }));
    assert_eq!((server.answer(json!({})), bare == "yes"), (bare, false));
    assert_eq!(server.answer(json!({ "adapter_id": "base" })), "yes");
    assert_eq!(server.answer(json!({ "model": format!("{own}:base") })), "yes");
    let named = ["serve", "--model", &f.model, "--adapters", &root, "--served-model-name", "base", "--port", "0"];
    assert!(error(&named).contains("--served-model-name"));
}

/// A conversation reaches the template in one form, with the variables and documents that are asked for; what a text model cannot take is
/// refused by name.
#[test]
fn conversations_are_written_by_the_template_as_they_are_meant() {
    let f = Fixture::new();
    let model = f.path("model");
    std::fs::create_dir(&model).unwrap();
    for file in std::fs::read_dir(&f.model).unwrap().map(|e| e.unwrap().path()) {
        std::fs::copy(&file, Path::new(&model).join(file.file_name().unwrap())).unwrap();
    }
    let template = "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %};{% endfor %}{% if tools %}T{{ tools | length }}{% endif %}{% if documents %}D{{ documents[0].text }}{% endif %}{% if enable_thinking is defined and not enable_thinking %}<no>{% endif %}{% if add_generation_prompt %}A:{% endif %}";
    std::fs::write(Path::new(&model).join("chat_template.jinja"), template).unwrap();
    let f = Fixture { model, ..f };
    let server = bare(&f);
    let ask = |messages: Value, more: Value| {
        let body = json!({ "messages": messages, "max_tokens": 5, "temperature": 0, "ignore_eos": true });
        server.post("/v1/chat/completions", &with(&body, more))
    };
    let user = json!({ "role": "user", "content": "Hi" });
    let calls = |arguments: Value, content: Option<Value>| {
        let mut message = json!({ "role": "assistant", "tool_calls": [{ "id": "c", "type": "function", "function": { "name": "tide", "arguments": arguments } }] });
        if let Some(content) = content {
            message["content"] = content;
        }
        json!([user, message, { "role": "tool", "tool_call_id": "c", "content": "4 m" }])
    };
    let called = "user:Hi;assistant:tide{\"port\": \"Brest\"};tool:4 m;A:";
    let (value, text) = (json!({ "port": "Brest" }), json!("{\"port\": \"Brest\"}"));
    let tools = json!([{ "type": "function", "function": { "name": "tide", "parameters": {} } }]);
    let last = |text: &str| json!([user, { "role": "assistant", "content": text }]);
    for (messages, more, expected) in [
        (json!([user]), json!({}), "user:Hi;A:"),
        (
            json!([{ "role": "user", "content": [{ "type": "text", "text": "H" }, { "type": "text", "text": "i" }] }]),
            json!({}),
            "user:Hi;A:",
        ),
        (calls(value.clone(), Some(json!(""))), json!({}), called),
        (calls(text.clone(), Some(json!(""))), json!({}), called),
        (calls(text.clone(), Some(Value::Null)), json!({}), called),
        (calls(text, None), json!({}), called),
        (json!([user]), json!({ "tools": tools }), "user:Hi;T1A:"),
        (json!([user]), json!({ "tools": tools, "tool_choice": "auto" }), "user:Hi;T1A:"),
        (json!([user]), json!({ "tools": tools, "tool_choice": "none" }), "user:Hi;A:"),
        (json!([user]), json!({ "tools": [] }), "user:Hi;A:"),
        (json!([user]), json!({ "chat_template_kwargs": { "enable_thinking": false } }), "user:Hi;<no>A:"),
        (json!([user]), json!({ "chat_template_kwargs": { "enable_thinking": true } }), "user:Hi;A:"),
        (json!([user]), json!({ "documents": [{ "text": "doc" }] }), "user:Hi;DdocA:"),
        (json!([user]), json!({ "add_generation_prompt": false }), "user:Hi;"),
        (last("So I"), json!({ "continue_final_message": true }), "user:Hi;assistant:So I"),
        (
            last(" So I "),
            json!({ "continue_final_message": true, "add_generation_prompt": false }),
            "user:Hi;assistant: So I ",
        ),
    ] {
        let answer = ask(messages.clone(), more.clone());
        assert_eq!(answer.status, 200, "{messages} {more}: {}", answer.body);
        let body = json!({ "prompt": expected, "max_tokens": 5, "temperature": 0, "ignore_eos": true });
        let plain = server.post("/v1/completions", &body).json();
        assert_eq!(answer.json()["usage"], plain["usage"], "{messages} {more}: {expected}");
        assert_eq!(answer.json()["choices"][0]["message"]["content"], plain["choices"][0]["text"], "{expected}");
    }
    let image = json!({ "type": "image_url", "image_url": { "url": "data:image/png;base64,iVBORw0KGgo=" } });
    let audio = json!({ "type": "input_audio", "input_audio": { "data": "", "format": "wav" } });
    for (messages, more, param, says) in [
        (
            json!([{ "role": "user", "content": [{ "type": "text", "text": "What?" }, image] }]),
            json!({}),
            "messages",
            "image_url",
        ),
        (json!([{ "role": "user", "content": [image] }]), json!({}), "messages", "image_url"),
        (json!([user, { "role": "user", "content": [audio] }]), json!({}), "messages", "message 2"),
        (json!([{ "role": "user" }]), json!({}), "messages", "content"),
        (calls(json!("{oops"), None), json!({}), "messages", "arguments"),
        (json!([user]), json!({ "tools": [1] }), "tools", "tool 1"),
        (json!([user]), json!({ "chat_template_kwargs": { "messages": [] } }), "chat_template_kwargs", "`messages`"),
        (json!([user]), json!({ "chat_template_kwargs": [] }), "chat_template_kwargs", "an object"),
        (json!([user]), json!({ "chat_template": "x" }), "chat_template", "adapter"),
        (last(" "), json!({ "continue_final_message": true }), "continue_final_message", "no text"),
        (
            last("x"),
            json!({ "continue_final_message": true, "add_generation_prompt": true }),
            "continue_final_message",
            "both",
        ),
    ] {
        let answer = ask(messages.clone(), more.clone());
        let error = answer.json()["error"].clone();
        assert_eq!((answer.status, error["param"].as_str()), (400, Some(param)), "{messages} {more}: {}", answer.body);
        assert!(error["message"].as_str().unwrap().contains(says), "{error}");
    }
}

/// What lm-evaluation-harness asks for (`local-completions`): the prompt's log-probabilities, the first null, held against transformers
/// (tests/goldens/make_scoring.py).
#[test]
fn prompts_are_scored_as_transformers_scores_them() {
    let f = Fixture::new();
    let root = f.path("none");
    std::fs::create_dir(&root).unwrap();
    // Prompts of several parts, too.
    let server = Server::start(&f, &root, &["--batch-tokens", "64"]);
    let golden = std::fs::read_to_string(common::goldens("scoring.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_str(&golden).unwrap();
    assert_eq!(cases.len(), 6);
    for case in &cases {
        let expected: Vec<f64> = serde_json::from_value(case["log_probabilities"].clone()).unwrap();
        let (n, context) = (expected.len() + 1, case["context_tokens"].as_u64().unwrap() as usize);
        let text =
            format!("{}{}", case["context"].as_str().unwrap(), case["continuation"].as_str().unwrap_or_default());
        let mut prompts = vec![case["tokens"].clone()];
        if case["continuation"].is_string() {
            prompts.push(json!(text));
        }
        for prompt in prompts {
            // Twice: what is kept of prompts does not take their log-probabilities away.
            for (max_tokens, stream) in [(0, false), (1, false), (0, true), (1, true)] {
                let ask = json!({
                    "prompt": prompt, "echo": true, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0, "seed": 1234, "stream": stream,
                });
                let answer = server.post("/v1/completions", &ask);
                assert_eq!(answer.status, 200, "{}", answer.body);
                let choice = match stream {
                    false => answer.json()["choices"][0].clone(),
                    true => events(&answer.body)[0]["choices"][0].clone(),
                };
                let told = &choice["logprobs"];
                let list = |key: &str| told[key].as_array().unwrap();
                assert_eq!(list("tokens").len(), n + max_tokens, "{told}");
                assert_eq!((&told["token_logprobs"][0], &told["top_logprobs"][0]), (&Value::Null, &Value::Null));
                let own: Vec<f64> = list("token_logprobs")[1..].iter().map(|p| p.as_f64().unwrap()).collect();
                for (a, b) in own.iter().zip(&expected) {
                    assert!((a - b).abs() < 2e-4, "{text}: {own:?} {expected:?}");
                }
                let sum: f64 = own[context - 1..n - 1].iter().sum();
                assert!((sum - case["sum"].as_f64().unwrap()).abs() < 1e-3, "{text}: {sum}");
                let likeliest = |top: &Value| {
                    top.as_object().unwrap().values().map(|p| p.as_f64().unwrap()).fold(f64::MIN, f64::max)
                };
                let greedy = (context..n)
                    .all(|i| likeliest(&told["top_logprobs"][i]) == told["token_logprobs"][i].as_f64().unwrap());
                assert_eq!(json!(greedy), case["greedy"], "{text}");
                let begins = choice["text"].as_str().unwrap().starts_with(&text);
                assert_eq!((&told["text_offset"][0], begins), (&json!(0), true), "{text}");
                if case["continuation"].is_string() {
                    // Every token is a byte, and stands where its letter does.
                    let letters: Vec<usize> =
                        text.chars().enumerate().flat_map(|(i, c)| vec![i; c.len_utf8()]).collect();
                    assert_eq!(
                        told["text_offset"].as_array().unwrap()[..n],
                        letters.iter().map(|i| json!(i)).collect::<Vec<_>>()
                    );
                }
            }
        }
    }
    let none = server.post("/v1/completions", &json!({ "prompt": "up", "max_tokens": 0 })).json();
    assert_eq!((&none["choices"][0]["text"], &none["usage"]["completion_tokens"]), (&json!(""), &json!(0)));
    assert_eq!(none["choices"][0]["finish_reason"], "length");
    // With `n` each choice has its prompt's.
    let ask = json!({
        "prompt": ["up 3", "x"], "n": 2, "echo": true, "logprobs": 0, "max_tokens": 2, "temperature": 1, "ignore_eos": true,
    });
    let all = server.post("/v1/completions", &ask).json();
    let counts = all["choices"].as_array().unwrap().iter().map(|c| c["logprobs"]["tokens"].as_array().unwrap().len());
    assert_eq!(counts.collect::<Vec<_>>(), [6, 6, 3, 3]);
}

/// Where no number of tokens is asked for, an answer gets what room there is: the context's, or the pool's if that is less; many such
/// requests at a time do not keep one another out, and each comes to its end.
#[test]
fn an_answer_that_is_not_bounded_goes_to_the_end_of_the_context() {
    let f = Fixture::new();
    let server = bare(&f);
    let ask = json!({ "prompt": "up 3", "temperature": 0, "ignore_eos": true });
    let whole = server.post("/v1/completions", &ask).json();
    assert_eq!(whole["usage"]["completion_tokens"], 508, "{whole}");
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    let last = server.post("/v1/completions", &json!({ "prompt": "x".repeat(511), "ignore_eos": true })).json();
    assert_eq!(last["usage"]["completion_tokens"], 1, "{last}");
    assert_eq!(server.post("/v1/completions", &json!({ "prompt": "x".repeat(512) })).status, 400);
    drop(server);
    let root = f.path("none");
    // A pool of 640 tokens: two at a time are expected to fit, and none of three can be kept to its end beside another.
    let server = Server::start(&f, &root, &["--pool", "168KB"]);
    let answers: Vec<Value> = std::thread::scope(|scope| {
        let one = |_| scope.spawn(|| server.post("/v1/completions", &ask).json());
        (0..3).map(one).collect::<Vec<_>>().into_iter().map(|t| t.join().unwrap()).collect()
    });
    for answer in answers {
        assert_eq!(answer["choices"][0]["text"], whole["choices"][0]["text"], "{}", answer["usage"]);
    }
    // Figures are told some time after.
    std::thread::sleep(Duration::from_millis(500));
    let engine = server.get("/v1/state").json()["figures"]["engine"].clone();
    assert!((70..90).contains(&engine["pages"].as_u64().unwrap()), "{engine}");
}

/// A model that is made to call a tool: the call comes as OpenAI has it, whole and streamed, in the form of the template's family. To be seen to fail: a
/// piece that is sent without its calls.
#[test]
fn tools_are_called_as_the_family_writes_it() {
    let f = Fixture::new();
    let model = f.path("model");
    std::fs::create_dir(&model).unwrap();
    for file in std::fs::read_dir(&f.model).unwrap().map(|e| e.unwrap().path()) {
        std::fs::copy(&file, Path::new(&model).join(file.file_name().unwrap())).unwrap();
    }
    let f = Fixture { model, ..f };
    let root = f.path("adapters");
    std::fs::create_dir(&root).unwrap();
    let parameters = json!({
        "type": "object", "required": ["port"], "additionalProperties": false,
        "properties": { "port": { "enum": ["Brest", "Cork"] }, "hours": { "type": "integer", "minimum": 0, "maximum": 9 } },
    });
    let tools = json!([
        { "type": "function", "function": { "name": "tide", "parameters": parameters.to_string() } },
        { "type": "function", "function": { "name": "wind", "parameters": { "type": "object", "properties": {}, "additionalProperties": false } } },
    ]);
    let ask = json!({ "messages": [{ "role": "user", "content": "Hi" }], "tools": tools, "max_tokens": 120, "temperature": 1, "seed": 5 });
    let templates = [
        "{{ messages[0].content }}{% if tools %}<tool_call>{\"name\"}</tool_call>{% endif %}",
        "{{ messages[0].content }}{% if tools %}Environment: ipython{% endif %}",
    ];
    for template in templates {
        std::fs::write(Path::new(&f.model).join("chat_template.jinja"), template).unwrap();
        let server = Server::start(&f, &root, &[]);
        let chat = |more: Value| server.post("/v1/chat/completions", &with(&ask, more));
        for choice in [json!("required"), json!({ "type": "function", "function": { "name": "tide" } })] {
            let answer = chat(json!({ "tool_choice": choice }));
            assert_eq!(answer.status, 200, "{}", answer.body);
            let choice_of = answer.json()["choices"][0].clone();
            // Of `<tool_call>` there may be several, and the last cut off.
            if choice_of["finish_reason"] == "length" && choice == "required" {
                continue;
            }
            assert_eq!(
                (&choice_of["finish_reason"], &choice_of["message"]["content"]),
                (&json!("tool_calls"), &Value::Null),
                "{answer}",
                answer = answer.body
            );
            let calls = choice_of["message"]["tool_calls"].as_array().unwrap();
            for call in calls {
                let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
                let fits = match call["function"]["name"].as_str().unwrap() {
                    "tide" => ["Brest", "Cork"].contains(&arguments["port"].as_str().unwrap()),
                    _ => choice == "required" && arguments == json!({}),
                };
                assert!(fits && call["type"] == "function", "{call}");
            }
            let streamed = events(&chat(json!({ "tool_choice": choice, "stream": true })).body);
            let told: Vec<Value> = streamed
                .iter()
                .filter_map(|e| e["choices"][0]["delta"]["tool_calls"].as_array())
                .flatten()
                .cloned()
                .collect();
            let functions = |calls: &[Value]| calls.iter().map(|c| c["function"].clone()).collect::<Vec<_>>();
            assert_eq!(functions(&told), functions(calls));
            assert!(told.iter().enumerate().all(|(i, call)| call["index"] == i), "{told:?}");
            let text: String = streamed.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect();
            assert_eq!(text, "");
            assert!(streamed.iter().any(|e| e["choices"][0]["finish_reason"] == "tool_calls"));
        }
        for (more, param) in [
            (json!({ "tool_choice": "any" }), "tool_choice"),
            (json!({ "tool_choice": { "type": "function", "function": { "name": "rain" } } }), "tool_choice"),
            (json!({ "tool_choice": { "type": "tool" } }), "tool_choice.type"),
            (json!({ "tool_choice": "required", "tools": [] }), "tool_choice"),
            (json!({ "tool_choice": "required", "response_format": { "type": "json_object" } }), "tool_choice"),
        ] {
            let refused = chat(more.clone());
            assert_eq!(
                (refused.status, &refused.json()["error"]["param"]),
                (400, &json!(param)),
                "{more}: {}",
                refused.body
            );
        }
    }
    std::fs::write(Path::new(&f.model).join("chat_template.jinja"), "{{ messages[0].content }}").unwrap();
    let server = Server::start(&f, &root, &[]);
    let refused = server.post("/v1/chat/completions", &with(&ask, json!({ "tool_choice": "required" })));
    assert!(
        refused.status == 400 && refused.body.contains("does not say how calls of tools are written"),
        "{}",
        refused.body
    );
    assert_eq!(server.post("/v1/chat/completions", &ask).status, 200);
}
