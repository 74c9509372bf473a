//! Tests of the whole program: the binary, its server, and what they say.

mod common;
#[path = "../../../../tests/support/tiny.rs"]
mod tiny;

mod cli;
mod cpu;
mod dynamics_cli;
mod encoder;
mod hub;
mod methods;
mod plan;
mod quantize;
mod serving_http;
mod serving_s3;
mod xlora;
