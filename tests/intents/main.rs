//! Calls to upstream services, on every store that keeps intents.

#[path = "../support/mod.rs"]
mod support;

mod completer;
mod intent_log;
mod kept_requests;
mod phases;
mod shop;
mod smoke;
