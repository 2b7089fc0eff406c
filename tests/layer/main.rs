//! The layer, on every store and on real sockets.

#[path = "../support/mod.rs"]
mod support;

mod bounds;
mod cache;
mod cancellation;
mod compose;
mod concurrency;
mod consumers;
mod crash;
mod flood;
mod gateways;
mod grpc;
mod harness;
mod held_refusals;
mod joined;
mod limits;
mod middleware;
mod nesting;
mod not_results;
mod outage;
mod panics;
mod readiness;
mod representation;
mod results;
mod same_request;
mod settings;
mod subscriber;
mod unguarded;
mod wire;
