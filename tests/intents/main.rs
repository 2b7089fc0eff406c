//! Calls to upstream services, on every store that keeps intents.

#[path = "../support/mod.rs"]
mod support;

#[path = "../transactions/bank.rs"]
#[allow(dead_code, unused_imports, unused_macros, reason = "the tests of transactions use the rest of it")]
mod bank;

mod arguments;
mod cases;
mod completer;
mod edges;
mod hooked;
mod intent_log;
mod kept_requests;
mod late;
mod lost_replies;
mod memory;
mod network;
mod payouts;
mod phases;
mod races;
mod read_back;
mod reconciler;
mod records_alone;
mod reports;
mod resumed;
mod rolled_back;
mod second_run;
mod shop;
mod site;
mod survival;
