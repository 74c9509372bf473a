//! What a request asks of the engine: adapters, sampling and tokens, checked.

use serde_json::Value as Json;

use super::{Adapters, Common, MAX_ADAPTERS, MAX_BIASES, MAX_CHOICES, MAX_STOPS, Wanted};
use crate::engine::Request;
use crate::engine::scheduler::Tenant;
use crate::generation::form::Constraint;
use crate::generation::sampling::Sampling;
use crate::generation::stream::TextOptions;
use crate::http::app::App;
use crate::http::client::client;
use crate::http::error::ApiError;
use crate::http::fields::{Field, Texts};
use crate::trace::Value;

impl Common {
    /// Refuses what can be refused before anything is computed. `least` is the smallest number of tokens that may be asked for.
    pub(super) fn check(&self, least: usize) -> Result<(), ApiError> {
        let asked = [("max_completion_tokens", self.max_completion_tokens), ("max_tokens", self.max_tokens)];
        for (name, asked) in asked {
            if asked.is_some_and(|n| n < least) {
                return Err(ApiError::field(name, format!("`{name}` should be at least {least}")));
            }
        }
        if self.max_tokens().zip(self.min_tokens).is_some_and(|(most, least)| least > most) {
            return Err(ApiError::field("min_tokens", "`min_tokens` should be at most `max_tokens`"));
        }
        if !(1..=MAX_CHOICES).contains(&self.n.unwrap_or(1)) {
            return Err(ApiError::field("n", format!("`n` should be from 1 to {MAX_CHOICES}")));
        }
        let (most, longest) = MAX_STOPS;
        let stops = self.stop.as_ref().map_or(&[][..], Texts::all);
        if stops.len() > most || stops.iter().any(|s| s.is_empty() || s.len() > longest) {
            let message = format!("`stop` should be at most {most} texts of 1 to {longest} bytes");
            return Err(ApiError::field("stop", message));
        }
        if self.stop_token_ids.as_ref().is_some_and(|ids| ids.len() > MAX_BIASES) {
            let message = format!("`stop_token_ids` should be at most {MAX_BIASES} tokens");
            return Err(ApiError::field("stop_token_ids", message));
        }
        if self.stream_options.is_some() && self.stream != Some(true) {
            return Err(ApiError::field("stream_options", "`stream_options` is taken only where `stream` is true"));
        }
        if self.truncate_prompt_tokens.is_some_and(|n| n < -1 || n == 0) {
            let message = "`truncate_prompt_tokens` should be at least 1, or -1 for as many as the model takes";
            return Err(ApiError::field("truncate_prompt_tokens", message));
        }
        if self.adapter.as_ref().zip(self.adapter_id.as_ref()).is_some_and(|(a, b)| a != b) {
            return Err(ApiError::field("adapter", "`adapter` and `adapter_id` mean the same; give one"));
        }
        if self.lora.as_ref().is_some_and(|all| all.len() > MAX_ADAPTERS) {
            return Err(ApiError::field("lora", format!("at most {MAX_ADAPTERS} adapters are put together")));
        }
        Ok(())
    }

    /// Most tokens of an answer, where there is a bound.
    pub(super) fn max_tokens(&self) -> Option<usize> {
        self.max_completion_tokens.or(self.max_tokens)
    }

    /// Names of the adapters asked for, with their weights: by `lora`, `adapter_id`, `model` = `base:adapter`, or `model` = adapter.
    pub fn adapters(&self, app: &App) -> Result<Vec<(String, f32)>, ApiError> {
        let model = self.model.as_deref().unwrap_or_default();
        let base = model.is_empty() || app.is_base(model);
        if model != app.name && base && app.store.as_ref().is_some_and(|store| store.contains(model)) {
            let own = &app.name;
            let message = format!(
                "`{model}` stands for the base and for an adapter; ask for the base as `{own}`, for the adapter with `adapter_id` or as `{own}:{model}`"
            );
            return Err(ApiError::field("model", message));
        }
        let own = match base {
            true => None,
            false => Some(match model.split_once(':') {
                Some((base, name)) if app.is_base(base) => name.trim_start_matches(':').to_string(),
                _ => model.to_string(),
            }),
        };
        let mut named: Vec<(String, f32)> = Vec::new();
        for w in self.lora.iter().flatten() {
            named.push((w.id.clone(), w.scale));
        }
        named.extend(self.adapter_id.as_ref().or(self.adapter.as_ref()).map(|name| (name.clone(), 1.0)));
        // `model` may say the same again, as some clients do.
        named.extend(own.filter(|own| !named.iter().any(|(name, _)| name == own)).map(|name| (name, 1.0)));
        Ok(named)
    }

    pub(super) fn sampling(&self, app: &App, ends: &[u32]) -> Result<Sampling, ApiError> {
        let top_k = match self.top_k.unwrap_or(0) {
            // Where -1 stands for all.
            -1 => 0,
            k => usize::try_from(k).map_err(|_| ApiError::field("top_k", "`top_k` should be 0 or more, or -1"))?,
        };
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(1.0),
            top_k,
            top_p: self.top_p.unwrap_or(1.0),
            min_p: self.min_p.unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
            frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
            presence_penalty: self.presence_penalty.unwrap_or(0.0),
            logit_bias: self.biases(app)?,
            allowed: self.allowed(app)?,
            min_tokens: self.min_tokens.unwrap_or(0),
            ends: ends.to_vec(),
        };
        // It speaks as the command line does: `--top-p 2 should be …`.
        let named = |problem: String| {
            let (flag, rest) = problem.split_once(' ').unwrap_or((&problem, ""));
            let name = flag.trim_start_matches('-').replace('-', "_");
            ApiError::field(&name, format!("`{name}` {rest}"))
        };
        sampling.check().map(|()| sampling).map_err(named)
    }

    pub(super) fn biases(&self, app: &App) -> Result<Vec<(u32, f32)>, ApiError> {
        let given = self.logit_bias.iter().flatten();
        if given.clone().count() > MAX_BIASES {
            return Err(ApiError::field("logit_bias", format!("`logit_bias` should be at most {MAX_BIASES} tokens")));
        }
        let of = |(token, bias): (&String, &Json)| {
            let at = format!("logit_bias.{}", token.chars().take(20).collect::<String>());
            let id = token.parse().map_err(|_| ApiError::field("logit_bias", format!("`{at}`: no token's number")))?;
            app.in_vocabulary("logit_bias", &[id])?;
            Ok((id, f32::read(bias.clone(), &at)?))
        };
        // A bias of null is none.
        given.filter(|(_, bias)| !bias.is_null()).map(of).collect()
    }

    pub(super) fn allowed(&self, app: &App) -> Result<Option<Vec<u32>>, ApiError> {
        let Some(allowed) = &self.allowed_token_ids else { return Ok(None) };
        if allowed.is_empty() {
            return Err(ApiError::field("allowed_token_ids", "`allowed_token_ids` should hold at least one token"));
        }
        app.in_vocabulary("allowed_token_ids", allowed)?;
        Ok(Some(allowed.clone()))
    }

    /// What is told of it in a trace, in the words of OpenTelemetry and, of `n`, vLLM.
    pub fn attributes(&self) -> Vec<(&'static str, Option<Value>)> {
        let whole = |n: Option<i64>| n.map(Value::Int);
        let number = |x: Option<f64>| x.map(Value::Double);
        vec![
            ("gen_ai.request.max_tokens", self.max_tokens().map(Value::from)),
            ("gen_ai.request.temperature", number(self.temperature)),
            ("gen_ai.request.top_p", number(self.top_p)),
            ("gen_ai.request.top_k", whole(self.top_k)),
            ("gen_ai.request.frequency_penalty", number(self.frequency_penalty)),
            ("gen_ai.request.presence_penalty", number(self.presence_penalty)),
            ("gen_ai.request.seed", whole(self.seed)),
            ("gen_ai.request.n", Some(self.n.unwrap_or(1).into())),
        ]
    }

    /// How the answer's tokens become text.
    pub fn text(&self) -> TextOptions {
        TextOptions {
            stop: self.stop.as_ref().map_or(&[][..], Texts::all).to_vec(),
            keep_stop: self.include_stop_str_in_output.unwrap_or(false),
            special: !self.skip_special_tokens.unwrap_or(true),
            min_tokens: self.min_tokens.unwrap_or(0),
        }
    }

    /// Shortens a prompt as asked.
    pub fn truncate(&self, prompt: &mut Vec<u32>, longest: usize) {
        let keep = match self.truncate_prompt_tokens {
            None => return,
            // Room for the answer is left too.
            Some(-1) => longest.saturating_sub(self.max_tokens().unwrap_or(1).max(1)),
            Some(n) => usize::try_from(n).unwrap_or(usize::MAX),
        };
        prompt.drain(..prompt.len().saturating_sub(keep.max(1)));
    }

    /// The engine's requests, so many for each prompt.
    pub fn requests(
        &self,
        app: &App,
        prompts: Vec<Vec<u32>>,
        adapters: &Adapters,
        (wanted, form): (Wanted, Option<Constraint>),
    ) -> Result<Vec<Request>, ApiError> {
        let mut stop = if self.ignore_eos == Some(true) { Vec::new() } else { app.base.text.eos_ids.clone() };
        let more = self.stop_token_ids.as_deref().unwrap_or_default();
        app.in_vocabulary("stop_token_ids", more)?;
        stop.extend(more);
        let sampling = self.sampling(app, &stop)?;
        let seed = self.seed.map_or_else(|| app.random(), |seed| seed as u64);
        let user = self.user.as_ref().or(self.safety_identifier.as_ref()).map_or("", String::as_str);
        let tenant = Tenant { client: client(), user: user.chars().take(100).collect::<String>().into() };
        let mut requests = Vec::new();
        for prompt in prompts {
            for i in 0..wanted.each {
                requests.push(Request {
                    prompt: prompt.clone(),
                    adapters: adapters.0.clone(),
                    max_tokens: self.max_tokens(),
                    sampling: sampling.clone(),
                    seed: seed.wrapping_add(i as u64),
                    stop: stop.clone(),
                    of_prompt: wanted.of_prompt,
                    log_probabilities: wanted.log_probabilities.or(wanted.ranked.then_some(0)),
                    tenant: tenant.clone(),
                    names: adapters.1.clone(),
                    form: form.clone(),
                });
            }
        }
        Ok(requests)
    }
}
