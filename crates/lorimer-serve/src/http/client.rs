//! Who asks, and whether he may.

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode, header};
use subtle::ConstantTimeEq;

use super::app::App;
use super::error::ApiError;

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (kind, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    kind.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// The other end of a connection.
#[derive(Clone, Copy)]
pub(super) struct Peer(pub(super) IpAddr);

tokio::task_local! {
    /// Who asks: what fairness goes by, since it cannot be made up.
    pub(super) static CLIENT: Arc<str>;
}

/// The client whose request is handled.
pub(super) fn client() -> Arc<str> {
    CLIENT.try_with(Arc::clone).unwrap_or_default()
}

/// A client by the machine that it connects from and the key that it brought, where one is needed.
pub(super) fn named(request: &Request, key: Option<usize>) -> Arc<str> {
    let ip = match request.extensions().get::<Peer>() {
        Some(Peer(IpAddr::V4(ip))) => ip.to_string(),
        // Whoever has one such address has all that differ in their last 64 bits.
        Some(Peer(IpAddr::V6(ip))) => ip.segments()[..4].iter().map(|s| format!("{s:x}:")).collect(),
        None => String::new(),
    };
    format!("{ip}/{}", key.map_or(String::new(), |key| key.to_string())).into()
}

/// Lets calls through that bring one of the tokens. Which it was; None where none is needed.
pub(super) fn permitted(
    app: &App,
    headers: &HeaderMap,
    keys: &[&Option<String>],
    what: &str,
) -> Result<Option<usize>, ApiError> {
    if app.loopback {
        // A name that is led to this machine by somebody else's DNS does not get in.
        let host = headers.get(header::HOST).and_then(|h| h.to_str().ok()).unwrap_or("localhost");
        let name = host.rsplit_once(':').filter(|(_, port)| port.parse::<u16>().is_ok()).map_or(host, |(name, _)| name);
        let literal: Option<IpAddr> = name.trim_matches(['[', ']']).parse().ok();
        if !name.eq_ignore_ascii_case("localhost") && !literal.is_some_and(|ip| ip.is_loopback()) {
            let message = "this server answers to localhost only";
            return Err(ApiError::new(StatusCode::FORBIDDEN, "wrong_host", message));
        }
    }
    let mut wanted = keys.iter().filter_map(|key| key.as_ref()).peekable();
    if wanted.peek().is_none() {
        return Ok(None);
    }
    let given = bearer(headers);
    if let Some(which) = given.and_then(|given| wanted.position(|key| given.as_bytes().ct_eq(key.as_bytes()).into())) {
        return Ok(Some(which));
    }
    let message = format!("this call needs `Authorization: Bearer` with the {what} key");
    Err(ApiError::new(StatusCode::UNAUTHORIZED, "unauthorized", message))
}

/// Refuses pages of other sites, which may send forms and calls without a body without being asked.
pub(super) fn same_site(headers: &HeaderMap) -> Result<(), ApiError> {
    let of = |name| headers.get(name).and_then(|value: &header::HeaderValue| value.to_str().ok());
    let Some(origin) = of(header::ORIGIN) else { return Ok(()) };
    match origin.split_once("://").map(|(_, host)| host) == of(header::HOST) {
        true => Ok(()),
        false => Err(ApiError::new(StatusCode::FORBIDDEN, "wrong_host", "pages of other sites cannot do this")),
    }
}
