//! Calls to upstream services, on every store that keeps intents.

#[path = "../support/mod.rs"]
mod support;

mod network;
mod payouts;
mod phases;
mod reconciler;
