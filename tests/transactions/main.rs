//! Transactions of handlers, on every store that has them.

#[path = "../support/mod.rs"]
mod support;

mod bank;
mod duplicates;
mod ended;
mod extraction;
mod kept;
mod late;
mod postgres;
mod postgres_faults;
mod results;
mod spoilt;
mod sqlite;
mod timeouts;
