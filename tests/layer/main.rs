//! The layer, on every store and on real sockets.

#[path = "../support/mod.rs"]
mod support;

mod cancellation;
mod compose;
mod concurrency;
mod crash;
mod flood;
mod harness;
mod middleware;
mod outage;
mod representation;
mod results;
mod settings;
mod unguarded;
mod wire;
