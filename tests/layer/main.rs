//! The layer, on every store and on real sockets.

#[path = "../support/mod.rs"]
mod support;

mod cancellation;
mod compose;
mod concurrency;
mod consumers;
mod crash;
mod flood;
mod harness;
mod middleware;
mod outage;
mod representation;
mod results;
mod same_request;
mod settings;
mod wire;
