//! The client for HTTP and HTTPS: ring's cryptography, the system's certificates, the environment's proxies.

/// Makes ring what this process encrypts with. Must come before a `reqwest::Client` is built anywhere in it; more than once does no harm.
pub fn install_ring() {
    // Fails only where there is a provider already.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// The beginning of a client. `reqwest::Client::builder()` panics in a process that has no provider; this one sees to it.
#[allow(clippy::disallowed_methods)]
pub fn client() -> reqwest::ClientBuilder {
    install_ring();
    reqwest::Client::builder()
}
