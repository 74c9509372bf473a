//! Where spans go and which: vLLM's flag, and OpenTelemetry's variables.

use std::time::Duration;

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use url::Url;

use super::context::Parent;

/// Path of traces below a collector's address.
const PATH: &str = "v1/traces";
/// For how long a collector may think about what it is sent.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Longest that it can be given.
const LONGEST: Duration = Duration::from_secs(600);
/// Names of the variable of the collector for traces, and of that for everything.
const OTLP: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_", "OTEL_EXPORTER_OTLP_"];
/// What goes over the wire.
const PROTOCOL: &str = "http/protobuf";

/// Where spans go and which.
#[derive(Clone, Debug)]
pub struct TraceSettings {
    /// What they are posted to.
    pub endpoint: Url,
    /// Headers that go with them.
    pub headers: HeaderMap,
    /// For how long the collector may think.
    pub timeout: Duration,
    /// Attributes of this server.
    pub resource: Vec<(String, String)>,
    /// Which are recorded.
    pub sampler: Sampler,
}

/// Which requests are recorded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampler {
    /// Whether a caller's decision goes before.
    pub parent_based: bool,
    /// The share of the others.
    pub ratio: f64,
}

impl Sampler {
    /// Whether a request is recorded, by the trace alone where its caller says nothing: so all servers that it comes to decide alike.
    pub fn samples(&self, parent: Option<&Parent>, trace: u128) -> bool {
        match parent.filter(|_| self.parent_based) {
            Some(parent) => parent.sampled,
            None => self.ratio >= 1.0 || ((trace as u64 >> 1) as f64) < self.ratio * (1u64 << 63) as f64,
        }
    }

    fn read(name: &str, argument: Option<String>) -> Result<Self, String> {
        let (parent_based, kind) = match name.strip_prefix("parentbased_") {
            Some(kind) => (true, kind),
            None => (false, name),
        };
        let ratio = match kind {
            "always_on" => 1.0,
            "always_off" => 0.0,
            "traceidratio" => {
                let text = argument.unwrap_or_else(|| "1".into());
                let ratio = text.trim().parse().ok().filter(|r| (0.0..=1.0).contains(r));
                ratio.ok_or_else(|| format!("OTEL_TRACES_SAMPLER_ARG `{text}` should be a number from 0 to 1"))?
            }
            _ => {
                return Err(format!(
                    "OTEL_TRACES_SAMPLER `{name}` is not offered; take always_on, always_off or traceidratio, or one of them after `parentbased_`"
                ));
            }
        };
        Ok(Self { parent_based, ratio })
    }
}

impl TraceSettings {
    /// What a flag and the environment say; None where nothing is to be exported.
    ///
    /// # Errors
    ///
    /// Fails if one of them asks for what is not offered, or cannot be read.
    pub fn of(flag: Option<&str>, variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, String> {
        // An empty variable counts as none, in all of OpenTelemetry.
        let get = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let of_otlp = |name: &str| {
            OTLP.iter().find_map(|prefix| get(&format!("{prefix}{name}")).map(|v| (format!("{prefix}{name}"), v)))
        };
        if get("OTEL_SDK_DISABLED").is_some_and(|off| off.trim().eq_ignore_ascii_case("true")) {
            return Ok(None);
        }
        let named = get("OTEL_TRACES_EXPORTER");
        let endpoint = match (flag, of_otlp("ENDPOINT")) {
            (Some(url), _) => endpoint("--otlp-traces-endpoint", url, "/", PATH)?,
            (None, _) if named.as_deref() == Some("none") => return Ok(None),
            (None, Some((name, url))) if name.contains("TRACES") => endpoint(&name, &url, "", "")?,
            (None, Some((name, url))) => endpoint(&name, &url, "*", PATH)?,
            (None, None) => return Ok(None),
        };
        if let Some(other) = named.filter(|name| !matches!(name.as_str(), "otlp" | "none")) {
            return Err(format!("OTEL_TRACES_EXPORTER `{other}` is not offered; take otlp or none"));
        }
        for (name, taken, instead) in [
            ("PROTOCOL", PROTOCOL, "give the collector's port for HTTP, mostly 4318"),
            ("COMPRESSION", "none", "spans are sent as they are"),
            ("CERTIFICATE", "", "name the file in SSL_CERT_FILE"),
            ("CLIENT_CERTIFICATE", "", "give the collector a key in OTEL_EXPORTER_OTLP_HEADERS"),
            ("CLIENT_KEY", "", "give the collector a key in OTEL_EXPORTER_OTLP_HEADERS"),
        ] {
            if let Some((name, value)) = of_otlp(name).filter(|(_, value)| value.trim() != taken) {
                let except = if taken.is_empty() { String::new() } else { format!(" except as `{taken}`") };
                return Err(format!("{name} `{}` is not offered{except}: {instead}", value.trim()));
            }
        }
        let timeout = match of_otlp("TIMEOUT") {
            None => TIMEOUT,
            Some((name, value)) => {
                let milliseconds = value.trim().parse().ok().map(Duration::from_millis);
                let given = milliseconds.filter(|given| !given.is_zero() && *given <= LONGEST);
                given.ok_or_else(|| {
                    format!("{name} `{value}` should be from 1 to {} milliseconds", LONGEST.as_millis())
                })?
            }
        };
        let headers =
            of_otlp("HEADERS").map_or_else(|| Ok(HeaderMap::new()), |(name, value)| headers(&name, &value))?;
        let sampler = get("OTEL_TRACES_SAMPLER").unwrap_or_else(|| "parentbased_always_on".into());
        let mut resource = match get("OTEL_RESOURCE_ATTRIBUTES") {
            None => Vec::new(),
            Some(list) => pairs("OTEL_RESOURCE_ATTRIBUTES", &list)?,
        };
        let mut own = |key: &str, value: String| {
            resource.retain(|(known, _)| known != key);
            resource.push((key.to_string(), value));
        };
        own("telemetry.sdk.name", "lorimer".into());
        own("telemetry.sdk.language", "rust".into());
        own("telemetry.sdk.version", env!("CARGO_PKG_VERSION").into());
        if let Some(service) = get("OTEL_SERVICE_NAME") {
            own("service.name", service);
        }
        for (key, value) in [("service.name", "lorimer"), ("service.version", env!("CARGO_PKG_VERSION"))] {
            if !resource.iter().any(|(known, _)| known == key) {
                resource.push((key.into(), value.into()));
            }
        }
        let sampler = Sampler::read(sampler.trim(), get("OTEL_TRACES_SAMPLER_ARG"))?;
        Ok(Some(Self { endpoint, headers, timeout, resource, sampler }))
    }
}

/// A collector's address. `path` is put behind one whose own path is `bare`: `/` for none, `*` for any.
fn endpoint(name: &str, text: &str, bare: &str, path: &str) -> Result<Url, String> {
    let wrong = |what: &str| format!("{name} `{}` {what}, as http://127.0.0.1:4318", shown(text));
    let mut url = Url::parse(text.trim()).map_err(|_| wrong("should be a URL"))?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none_or(str::is_empty) {
        return Err(wrong("should be the URL of a collector for OTLP over HTTP"));
    }
    if bare == "*" || url.path() == bare {
        url.set_path(&format!("{}/{path}", url.path().trim_end_matches('/')));
    }
    Ok(url)
}

/// An address without what is secret in it.
pub(super) fn shown(text: &str) -> String {
    let Ok(mut url) = Url::parse(text.trim()) else {
        return text.rsplit('@').next().unwrap_or_default().chars().take(200).collect();
    };
    url.set_query(None);
    match url.set_username("").and_then(|()| url.set_password(None)) {
        Ok(()) => url.to_string(),
        Err(()) => format!("{}:…", url.scheme()),
    }
}

/// `key=value,key=value`, values with `%2C` and the like for what cannot stand in them.
fn pairs(name: &str, list: &str) -> Result<Vec<(String, String)>, String> {
    let one = |pair: &str| {
        let (key, value) = pair.split_once('=')?;
        let value = unescaped(value.trim())?;
        (!key.trim().is_empty()).then(|| (key.trim().to_string(), value))
    };
    let all = list.split(',').filter(|pair| !pair.trim().is_empty()).map(one);
    // What it holds may be secret.
    all.collect::<Option<_>>().ok_or_else(|| format!("{name} should be `key=value` pairs with commas between them"))
}

/// A text with its `%xx` read; None where they are not UTF-8.
fn unescaped(text: &str) -> Option<String> {
    let (mut out, mut rest) = (Vec::new(), text.as_bytes());
    while let Some((&byte, after)) = rest.split_first() {
        let hex = |b: u8| char::from(b).to_digit(16).map(|d| d as u8);
        let escaped = after.first_chunk::<2>().and_then(|[a, b]| Some(hex(*a)? << 4 | hex(*b)?));
        match escaped.filter(|_| byte == b'%') {
            Some(byte) => {
                out.push(byte);
                rest = &after[2..];
            }
            None => {
                out.push(byte);
                rest = after;
            }
        }
    }
    String::from_utf8(out).ok()
}

fn headers(name: &str, list: &str) -> Result<HeaderMap, String> {
    let mut all = HeaderMap::new();
    for (key, value) in pairs(name, list)? {
        let (Ok(header), Ok(mut value)) = (key.parse::<HeaderName>(), HeaderValue::from_str(&value)) else {
            return Err(format!("{name}: `{key}` cannot be a header with what it is given"));
        };
        value.set_sensitive(true);
        all.insert(header, value);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(flag: Option<&str>, variables: &[(&str, &str)]) -> Result<Option<TraceSettings>, String> {
        TraceSettings::of(flag, |name| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string()))
    }

    /// To be seen to fail: the variable for everything before that for traces, or a path put behind the latter.
    #[test]
    fn spans_go_where_flag_and_environment_say() {
        let url = |flag, variables: &[_]| of(flag, variables).unwrap().map(|s| s.endpoint.to_string());
        let (all, traces) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT");
        assert_eq!(url(None, &[]), None);
        assert_eq!(url(None, &[(all, ""), (traces, " ")]), None);
        assert_eq!(url(Some("http://c:4318"), &[]).unwrap(), "http://c:4318/v1/traces");
        assert_eq!(
            url(Some("https://c/otel/traces?key=1"), &[(all, "http://d")]).unwrap(),
            "https://c/otel/traces?key=1"
        );
        assert_eq!(url(None, &[(all, "http://c:4318")]).unwrap(), "http://c:4318/v1/traces");
        assert_eq!(url(None, &[(all, "http://c:4318/my/")]).unwrap(), "http://c:4318/my/v1/traces");
        assert_eq!(url(None, &[(all, "http://c"), (traces, "http://d")]).unwrap(), "http://d/");
        assert_eq!(url(None, &[(traces, "http://d/v1/traces")]).unwrap(), "http://d/v1/traces");
        for off in [("OTEL_SDK_DISABLED", "True"), ("OTEL_TRACES_EXPORTER", "none")] {
            assert_eq!(url(None, &[(all, "http://c"), off]), None);
        }
        assert!(url(Some("http://c"), &[("OTEL_TRACES_EXPORTER", "none")]).is_some(), "a flag goes before");
    }

    #[test]
    fn what_is_not_offered_is_refused_by_name() {
        let flag = Some("http://c");
        for (variable, value) in [
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
            ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/ca.pem"),
            ("OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY", "/key.pem"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "0"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "no pair"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "a b=c"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "a=%0a"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "a=%ff"),
            ("OTEL_TRACES_EXPORTER", "zipkin"),
            ("OTEL_TRACES_SAMPLER", "jaeger_remote"),
            ("OTEL_RESOURCE_ATTRIBUTES", "=x"),
        ] {
            let refused = of(flag, &[(variable, value)]).unwrap_err();
            assert!(refused.starts_with(variable) && !refused.contains('\n'), "{refused}");
        }
        let sampler = ("OTEL_TRACES_SAMPLER", "traceidratio");
        assert!(of(flag, &[sampler, ("OTEL_TRACES_SAMPLER_ARG", "2")]).unwrap_err().contains("from 0 to 1"));
        for url in ["", "c:4318", "ftp://c", "http://", "grpc://c:4317", "unix:/run/c.sock"] {
            let refused = of(Some(url), &[]).unwrap_err();
            assert!(refused.starts_with("--otlp-traces-endpoint"), "{refused}");
        }
        let refused = of(Some("ftp://me:secret@c/?key=secret"), &[]).unwrap_err();
        assert!(!refused.contains("secret"), "{refused}");
        assert!(of(flag, &[("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")]).is_ok());
    }

    /// To be seen to fail: OTEL_RESOURCE_ATTRIBUTES before OTEL_SERVICE_NAME.
    #[test]
    fn a_server_has_a_name_and_headers() {
        let named = |variables: &[_]| {
            let resource = of(Some("http://c"), variables).unwrap().unwrap().resource;
            let get = |key: &str| resource.iter().filter(|(k, _)| k == key).map(|(_, v)| v.clone()).collect::<Vec<_>>();
            (get("service.name"), get("k8s.pod.name"))
        };
        assert_eq!(named(&[]), (vec!["lorimer".to_string()], vec![]));
        let attributes = ("OTEL_RESOURCE_ATTRIBUTES", "service.name=a, k8s.pod.name = p%2C1%zz%,");
        assert_eq!(named(&[attributes]), (vec!["a".into()], vec!["p,1%zz%".into()]));
        assert_eq!(named(&[attributes, ("OTEL_SERVICE_NAME", "b")]).0, ["b"]);
        let more =
            [("OTEL_EXPORTER_OTLP_HEADERS", "Authorization=Bearer%20x,a=b=c"), ("OTEL_EXPORTER_OTLP_TIMEOUT", "250")];
        let settings = of(Some("http://c"), &more).unwrap().unwrap();
        assert_eq!(
            (&settings.headers["authorization"], &settings.headers["a"]),
            (&HeaderValue::from_static("Bearer x"), &HeaderValue::from_static("b=c"))
        );
        assert!(settings.timeout == Duration::from_millis(250) && !format!("{settings:?}").contains("Bearer"));
    }

    /// To be seen to fail: the caller's decision passed over.
    #[test]
    fn callers_decide_what_is_recorded_unless_told_otherwise() {
        let parent = |sampled| Some(Parent { trace: 1, span: 1, sampled, state: String::new() });
        let samples = |name: &str, ratio: &str, parent: Option<Parent>, trace| {
            Sampler::read(name, Some(ratio.into())).unwrap().samples(parent.as_ref(), trace)
        };
        for (name, with, without, alone) in [
            ("parentbased_always_on", true, false, true),
            ("parentbased_always_off", true, false, false),
            ("parentbased_traceidratio", true, false, false),
            ("always_on", true, true, true),
            ("always_off", false, false, false),
            ("traceidratio", false, false, false),
        ] {
            let all = [parent(true), parent(false), None].map(|p| samples(name, "0.25", p, u128::MAX));
            assert_eq!(all, [with, without, alone], "{name}");
        }
        let half = (0..1000u64)
            .filter(|i| samples("traceidratio", "0.5", None, u128::from(i.wrapping_mul(0x9e37_79b9_7f4a_7c15))))
            .count();
        assert!((450..550).contains(&half), "{half}");
        assert!(samples("traceidratio", "1", None, u128::MAX) && !samples("traceidratio", "0", None, 1 << 64));
    }
}
