//! Tests of the whole program: the binary, its server, and what they say.

mod common;
#[path = "../../../../tests/support/tiny.rs"]
mod tiny;

mod attention_grad;
mod cli;
mod combine;
mod cpu;
mod damaged;
mod dynamics_cli;
mod encoder;
mod federate;
mod grouped;
mod hub;
mod interrupted;
mod limits;
mod methods;
mod plan;
mod pruning;
mod quantize;
mod serving_http;
mod serving_s3;
mod xlora;
