//! The layer, on every store and on real sockets.

#[path = "../support/mod.rs"]
mod support;

mod cancellation;
mod compose;
mod concurrency;
mod crash;
mod flood;
mod grpc;
mod harness;
mod middleware;
mod not_results;
mod outage;
mod representation;
mod results;
mod settings;
mod wire;
