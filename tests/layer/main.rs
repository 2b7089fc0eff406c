//! The layer, on every store and on real sockets.

#[path = "../support/mod.rs"]
mod support;

mod bounds;
mod cancellation;
mod compose;
mod concurrency;
mod crash;
mod flood;
mod harness;
mod limits;
mod middleware;
mod nesting;
mod outage;
mod panics;
mod readiness;
mod representation;
mod results;
mod settings;
mod subscriber;
mod wire;
